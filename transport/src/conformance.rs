//! What every [`crate::Transport`] promises, as one suite to run over each implementation.
