//! One suite over both engines.

use std::os::unix::fs::FileExt;

use kvtier_memory::AlignedBuf;

use super::*;
use crate::conformance::payload;

fn engines() -> Vec<Arc<dyn BlockIo>> {
    let mut engines = vec![start(IoEngine::Threads, 4).unwrap().0];
    match start(IoEngine::Uring, 4) {
        Ok((uring, _)) => engines.push(uring),
        Err(error) => println!("SKIPPED: io_uring is not available here: {error}"),
    }
    engines
}

fn part(bytes: &[u8]) -> Part {
    Part { len: bytes.len(), buf: IoBuf::Heap(AlignedBuf::from_slice(bytes)) }
}

#[tokio::test]
async fn moves_several_buffers_at_once() {
    for io in engines() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let (head, tail) = (payload(1, PAGE_BYTES), payload(2, 3 * PAGE_BYTES));
        let write = Transfer::new(Arc::clone(&file), Direction::Write, 8192, vec![part(&head), part(&tail)]);
        let written = io.run(write).await;
        written.result.unwrap();
        assert_eq!(written.parts.len(), 2, "buffers come back");
        let zeros = vec![part(&[0; 2 * PAGE_BYTES]), part(&[0; 2 * PAGE_BYTES])];
        let read = io.run(Transfer::new(file, Direction::Read, 8192, zeros)).await;
        read.result.unwrap();
        let mut bytes = [vec![0; 2 * PAGE_BYTES], vec![0; 2 * PAGE_BYTES]];
        for (part, into) in read.parts.iter().zip(&mut bytes) {
            part.buf.copy_out(into);
        }
        assert!(bytes.concat() == [head, tail].concat(), "{}", io.describe());
    }
}

#[tokio::test]
async fn errors_and_ends_of_files_are_told() {
    for io in engines() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 3 * PAGE_BYTES], 0).unwrap();
        let read = Transfer::new(Arc::new(file), Direction::Read, 0, vec![part(&[0; 4 * PAGE_BYTES])]);
        let finished = io.run(read).await;
        assert_eq!(finished.result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{}", io.describe());
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let write = Transfer::new(Arc::new(full), Direction::Write, 0, vec![part(&[0; PAGE_BYTES])]);
        let finished = io.run(write).await;
        assert!(is_no_space(&finished.result.unwrap_err()), "{}", io.describe());
        assert_eq!(finished.parts.len(), 1, "buffers come back");
    }
}

#[tokio::test]
async fn serves_more_transfers_than_its_depth() {
    for io in engines() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let tasks: Vec<_> = (0..200u64)
            .map(|n| {
                let (io, file) = (Arc::clone(&io), Arc::clone(&file));
                tokio::spawn(async move {
                    let offset = n * PAGE_BYTES as u64;
                    let parts = vec![part(&payload(n, PAGE_BYTES))];
                    io.run(Transfer::new(file, Direction::Write, offset, parts)).await.result.unwrap();
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let mut bytes = vec![0; PAGE_BYTES];
        for n in 0..200u64 {
            file.read_exact_at(&mut bytes, n * PAGE_BYTES as u64).unwrap();
            assert!(bytes == payload(n, PAGE_BYTES), "{}", io.describe());
        }
    }
}

#[tokio::test]
async fn what_a_transfer_keeps_is_dropped_at_its_end_even_if_nobody_waits() {
    for io in engines() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let (alive, mut ended) = tokio::sync::mpsc::channel::<()>(1);
        let mut write = Transfer::new(file, Direction::Write, 0, vec![part(&payload(1, 1 << 20))]);
        write.keep = Some(Box::new(alive));
        tokio::select! {
            biased;
            _ = io.run(write) => {}
            () = std::future::ready(()) => {}
        }
        assert!(ended.recv().await.is_none());
    }
}

#[test]
fn a_short_transfer_goes_on_at_a_page() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    let parts = vec![part(&[0; PAGE_BYTES]), part(&[0; 2 * PAGE_BYTES])];
    let mut transfer = Transfer::new(file, Direction::Read, 0, parts);
    assert!(transfer.advance(Ok(PAGE_BYTES + 100)).is_none());
    assert_eq!(transfer.position(), PAGE_BYTES as u64);
    assert_eq!(transfer.iovecs().len(), 1);
    assert!(transfer.advance(Err(io::ErrorKind::Interrupted.into())).is_none());
    assert!(transfer.advance(Ok(10)).unwrap().is_err(), "no whole page: no progress");
    assert!(transfer.advance(Ok(2 * PAGE_BYTES)).unwrap().is_ok());
}
