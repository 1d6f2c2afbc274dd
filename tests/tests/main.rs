//! Real daemons and real connectors, as processes: one binary, so that they are linked once.
#![forbid(unsafe_code)]

mod ahead;
mod claims;
mod cluster;
mod corruption;
mod device;
mod directory;
mod disk;
mod everywhere;
mod evict;
mod graphs;
mod hang;
mod hints;
mod hostile;
mod kill;
mod life;
mod movement;
mod object;
mod placement;
mod programs;
mod rules;
mod spread;
mod taints;
mod tenancy;
mod watch;
