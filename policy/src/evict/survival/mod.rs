//! Survival ranking: what is least likely to be used soon, by what became of its like, goes first.
//!
//! *Words*: a segment is the blocks last used by one model call of one program, of one semantic type. Segments of like
//! features form a class; a class has a curve: how often its segments were used again at which age (Kaplan-Meier), and from
//! that the best rate of uses per second of waiting that is still to be had at each age (Gittins index). A segment's rank is
//! the index of its class at its age.
//!
//! Hints choose the class and nothing else: what they are worth is learnt.

mod class;
mod curve;
mod ranking;
mod segment;
mod segments;

pub use class::{MAX_CLASSES, StopReason};
pub use ranking::SurvivalRanking;
pub use segment::{CallFacts, Pause, SegmentId};
pub use segments::Segments;
