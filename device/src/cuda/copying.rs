//! The wall around copies: a work's runs and checksums given to a stream, by the method that was asked for.
#![expect(unsafe_code, reason = "calls of the driver with addresses that the submitter vouches for")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvtier_memory::copy::Run;

use super::PLAINEST;
use super::api::{Address, CopyAttributes, Handle, Location};
use super::context::{Attribute, Context};
use super::kernels::Kernels;
use super::pinned::Table;
use crate::fold::{SPAN_BYTES, join};
use crate::{DeviceError, Method, Span, Work};

/// What one block of the copy kernel takes: enough to be worth starting, few enough that a work fills the GPU's bus.
const PART_BYTES: u64 = 32 << 10;
/// Runs of one batched copy: drivers are reported to fail with many times as many.
const BATCH_RUNS: usize = 4096;
/// Words of a run, of a span, of a span's checksum in a [`Table`].
const RUN_WORDS: usize = 3;
const SPAN_WORDS: usize = 2;

/// Ways to copy on one GPU.
#[derive(Debug)]
pub(super) struct Copier {
    context: Arc<Context>,
    kernels: Option<Kernels>,
    /// The driver copies in batches, and has not refused one yet.
    batches: AtomicBool,
    notes: Vec<String>,
}

/// What a work needs of a table.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// Parts of its runs, for the kernel; none otherwise.
    parts: Vec<Run>,
    /// Its spans in pieces, and how many pieces each frame has.
    spans: Vec<Span>,
    frames: Vec<usize>,
}

impl Layout {
    pub(super) fn words(&self) -> usize {
        RUN_WORDS * self.parts.len() + (SPAN_WORDS + 1) * self.spans.len()
    }

    fn spans_at(&self) -> usize {
        RUN_WORDS * self.parts.len()
    }

    fn sums_at(&self) -> usize {
        self.spans_at() + SPAN_WORDS * self.spans.len()
    }

    /// The checksum of each frame, once the kernel has ended.
    pub(super) fn sums(&self, table: &Table) -> Vec<u64> {
        let raw = table.read(self.sums_at(), self.spans.len());
        let mut pieces = raw.into_iter().zip(self.spans.iter().map(|s| s.bytes));
        self.frames.iter().map(|count| join(pieces.by_ref().take(*count))).collect()
    }
}

/// A run in parts.
fn parts(run: &Run) -> impl Iterator<Item = Run> {
    let (run, step) = (*run, usize::try_from(PART_BYTES).expect("it is small"));
    (0..run.len).step_by(step).map(move |at| Run {
        src: run.src.wrapping_add(at),
        dst: run.dst.wrapping_add(at),
        len: step.min(run.len - at),
    })
}

/// A span in pieces.
fn pieces(span: Span) -> impl Iterator<Item = Span> {
    let count = span.bytes.div_ceil(SPAN_BYTES);
    (0..count)
        .map(move |i| Span { base: span.base + i * SPAN_BYTES, bytes: SPAN_BYTES.min(span.bytes - i * SPAN_BYTES) })
}

impl Copier {
    pub(super) fn new(context: &Arc<Context>) -> Self {
        let mut notes = Vec::new();
        // Where a GPU knows registered memory by another address, a batch or a kernel that uses the host's would be lost.
        let reaches = context.attribute(Attribute::HostPointers);
        let batches = reaches && (context.api.batch.is_some() || context.api.batch_v2.is_some());
        let kernels = if reaches {
            if !batches {
                notes.push("the driver has no batched copies (they come with CUDA 12.8)".to_owned());
            }
            Kernels::load(context).map_err(|error| notes.push(format!("no kernels: {error}"))).ok()
        } else {
            notes.push(
                "runs are copied one by one: the GPU does not reach registered memory by its own address".to_owned(),
            );
            None
        };
        Self { context: Arc::clone(context), kernels, batches: AtomicBool::new(batches), notes }
    }

    pub(super) fn methods(&self) -> Vec<Method> {
        let batch = self.batches.load(Ordering::Relaxed).then_some(Method::Batch);
        let kernel = self.kernels.as_ref().map(|_| Method::Kernel);
        [Some(PLAINEST), batch, kernel].into_iter().flatten().collect()
    }

    pub(super) const fn sums(&self) -> bool {
        self.kernels.is_some()
    }

    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Works out what a work needs.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for checksums of what is not whole words.
    pub(super) fn lay_out(&self, work: &Work) -> Result<Layout, DeviceError> {
        let spans: Vec<Span> = work.sums.iter().flatten().copied().collect();
        if spans.iter().any(|s| !s.base.is_multiple_of(8) || !s.bytes.is_multiple_of(8)) {
            return Err(DeviceError::Unsupported { what: "a checksum of memory that is not whole words" });
        }
        let by_kernel = work.method == Method::Kernel && self.kernels.is_some();
        let frame = |spans: &Vec<Span>| spans.iter().map(|s| pieces(*s).count()).sum();
        Ok(Layout {
            parts: if by_kernel { work.runs.iter().flat_map(parts).collect() } else { Vec::new() },
            frames: work.sums.iter().map(frame).collect(),
            spans: spans.into_iter().flat_map(pieces).collect(),
        })
    }

    /// Gives a work to a stream; the context is current. After an error some of it may have been given.
    pub(super) fn issue(
        &self,
        stream: Handle,
        work: &Work,
        (layout, table): (&Layout, &mut Table),
    ) -> Result<(), DeviceError> {
        let run = |r: &Run| [r.src.addr() as u64, r.dst.addr() as u64, r.len as u64];
        table.fill(0, layout.parts.iter().flat_map(run));
        table.fill(layout.spans_at(), layout.spans.iter().flat_map(|s| [s.base, s.bytes]));
        match &self.kernels {
            Some(kernels) if !layout.parts.is_empty() => kernels.copy(stream, table.address(0), layout.parts.len())?,
            _ if work.method == Method::Single || !self.batches.load(Ordering::Relaxed) => {
                self.singles(stream, &work.runs)?
            }
            _ => self.batch_or_singles(stream, &work.runs)?,
        }
        match &self.kernels {
            Some(kernels) if !layout.spans.is_empty() => {
                let spans = (table.address(layout.spans_at()), layout.spans.len());
                kernels.sum(stream, spans, table.address(layout.sums_at()))
            }
            _ => Ok(()),
        }
    }

    fn singles(&self, stream: Handle, runs: &[Run]) -> Result<(), DeviceError> {
        for run in runs.iter().filter(|r| r.len > 0) {
            let (to, from) = (run.dst.addr() as u64, run.src.addr() as u64);
            // SAFETY: the submitter promised that both ranges are mapped until the work's end is told.
            let code = unsafe { (self.context.api.copy_async)(to, from, run.len, stream) };
            self.context.check("cuMemcpyAsync", code)?;
        }
        Ok(())
    }

    /// A batch that the driver refuses is copied run by run, and so are all after it: copying twice does no harm.
    fn batch_or_singles(&self, stream: Handle, runs: &[Run]) -> Result<(), DeviceError> {
        match runs.chunks(BATCH_RUNS).try_for_each(|some| self.batch(stream, some)) {
            Err(error @ (DeviceError::Call { .. } | DeviceError::Unsupported { .. })) => {
                if self.batches.swap(false, Ordering::Relaxed) {
                    tracing::warn!(%error, "the driver refuses batched copies: runs are copied one by one from now on");
                }
                self.singles(stream, runs)
            }
            other => other,
        }
    }

    fn batch(&self, stream: Handle, runs: &[Run]) -> Result<(), DeviceError> {
        let runs = || runs.iter().filter(|r| r.len > 0);
        let to: Vec<Address> = runs().map(|r| r.dst.addr() as u64).collect();
        let from: Vec<Address> = runs().map(|r| r.src.addr() as u64).collect();
        let bytes: Vec<usize> = runs().map(|r| r.len).collect();
        if bytes.is_empty() {
            return Ok(());
        }
        let attributes =
            CopyAttributes { source_order: 1, source: Location::default(), destination: Location::default(), flags: 0 };
        let (api, first) = (self.context.api, 0_usize);
        let (to, from, len, count) = (to.as_ptr(), from.as_ptr(), bytes.as_ptr(), bytes.len());
        let code = match (api.batch, api.batch_v2) {
            (Some(batch), _) => {
                let mut failed = 0_usize;
                // SAFETY: three arrays of `count`; one set of attributes, for all from the first on; ranges as for singles.
                unsafe {
                    batch(to, from, len, count, &raw const attributes, &raw const first, 1, &raw mut failed, stream)
                }
            }
            // SAFETY: as above, without the place of a failure.
            (None, Some(batch)) => unsafe {
                batch(to, from, len, count, &raw const attributes, &raw const first, 1, stream)
            },
            (None, None) => return Err(DeviceError::Unsupported { what: "copying in batches" }),
        };
        self.context.check("cuMemcpyBatchAsync", code)
    }
}
