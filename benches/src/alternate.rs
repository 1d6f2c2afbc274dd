//! Rounds in which the subject and the baseline take turns at being first.

use crate::stats::Round;

/// Takes a round; who is first alternates with its number.
///
/// # Errors
/// The subject's and the baseline's.
pub(crate) fn round(
    number: u32,
    subject: impl FnOnce() -> anyhow::Result<f64>,
    baseline: impl FnOnce() -> anyhow::Result<f64>,
) -> anyhow::Result<Round> {
    if number.is_multiple_of(2) {
        let baseline_s = baseline()?;
        return Ok(Round { subject_s: subject()?, baseline_s });
    }
    let subject_s = subject()?;
    Ok(Round { subject_s, baseline_s: baseline()? })
}
