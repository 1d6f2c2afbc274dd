//! Agent programs on a cluster, in closed loop.

mod admit;
mod cache;
mod calibrate;
mod config;
mod cost;
mod decisions;
mod dist;
mod engine;
mod finish;
mod forecast;
mod foresight;
mod html;
mod links;
mod metrics;
mod node;
mod place;
mod plots;
mod pool;
mod report;
mod run;
mod store;
mod sweep;
#[cfg(test)]
mod tests;
mod tree;
mod workloads;
mod world;

pub use calibrate::CalibrateArgs;
pub use run::RunArgs;
pub use sweep::SweepArgs;
