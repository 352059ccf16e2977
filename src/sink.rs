//! A queue before what may block or fail: who puts something in never waits for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::time::Duration;

use crate::tasks;

/// Where entries are written, by a thread of their own. Clones are the same queue.
///
/// What does not fit, or cannot be written, is lost and counted; what comes after it is told how many that were.
#[derive(Debug)]
pub struct Sink<T> {
    sender: Sender<Item<T>>,
    counts: Arc<Counts>,
    /// The most that may wait, in bytes.
    most: usize,
}

impl<T> Clone for Sink<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), counts: Arc::clone(&self.counts), most: self.most }
    }
}

/// What is known of a queue from outside.
#[derive(Debug, Default)]
struct Counts {
    /// Bytes that are put in and not written yet.
    waiting: AtomicUsize,
    /// Entries that are lost and of which nobody was told.
    lost: AtomicU64,
}

enum Item<T> {
    /// Something to write, and how large it is.
    Entry(T, usize),
    /// Is to be answered once all before it is written.
    Flush(SyncSender<()>),
}

/// Writes what a queue holds. It may block for as long as it likes.
pub trait Writer<T>: Send + 'static {
    /// Writes these in order, after saying that so many were lost before them, if any were. Answers with how many of
    /// all those are lost now, which it is told the next time.
    fn write(&mut self, entries: Vec<T>, lost: u64) -> u64;

    /// All that was put in so far is written: now it may be made to last.
    fn flush(&mut self) {}
}

/// The most entries that are written at once, so that room in the queue comes back in steps.
const MOST_AT_ONCE: usize = 256;

impl<T: Send + 'static> Sink<T> {
    /// Starts the thread, which ends with the last of the clones.
    ///
    /// # Errors
    ///
    /// Those of the system when it gives no thread.
    pub fn start(name: &str, most: usize, writer: impl Writer<T>) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let counts = Arc::new(Counts::default());
        let running = Running { receiver, counts: Arc::clone(&counts), writer };
        // It is flushed where somebody waits for it; how it ends is no news.
        drop(tasks::detached(name, move || running.run())?);
        Ok(Self { sender, counts, most })
    }

    /// Puts an entry of this size, in bytes, in. `false` when it is lost.
    pub fn offer(&self, entry: T, size: usize) -> bool {
        let before = self.counts.waiting.fetch_add(size, Ordering::Relaxed);
        if before.saturating_add(size) <= self.most
            && self.sender.send(Item::Entry(entry, size)).is_ok()
        {
            return true;
        }
        self.counts.waiting.fetch_sub(size, Ordering::Relaxed);
        self.counts.lost.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// Waits until all that was put in so far is written, for at most this long. Whether it is.
    pub fn flush(&self, limit: Duration) -> bool {
        let (sender, done) = mpsc::sync_channel(1);
        self.sender.send(Item::Flush(sender)).is_ok() && done.recv_timeout(limit).is_ok()
    }
}

struct Running<T, W> {
    receiver: Receiver<Item<T>>,
    counts: Arc<Counts>,
    writer: W,
}

impl<T, W: Writer<T>> Running<T, W> {
    fn run(mut self) {
        while let Ok(first) = self.receiver.recv() {
            let (mut entries, mut size, mut flush) = (Vec::new(), 0, None);
            let mut next = Some(first);
            while let Some(item) = next {
                match item {
                    Item::Entry(entry, bytes) => {
                        size += bytes;
                        entries.push(entry);
                    }
                    Item::Flush(done) => {
                        flush = Some(done);
                        break;
                    }
                }
                let has_room = entries.len() < MOST_AT_ONCE;
                next = if has_room { self.receiver.try_recv().ok() } else { None };
            }
            let lost = self.counts.lost.swap(0, Ordering::Relaxed);
            if lost > 0 || !entries.is_empty() {
                let lost = self.writer.write(entries, lost);
                self.counts.lost.fetch_add(lost, Ordering::Relaxed);
            }
            self.counts.waiting.fetch_sub(size, Ordering::Relaxed);
            if let Some(done) = flush {
                self.writer.flush();
                // Who waits may have given up.
                let _gone = done.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Writes down what it gets, or fails as long as it is told to; waits for a word before each time.
    struct Fake {
        go: Receiver<()>,
        fails: Arc<Mutex<bool>>,
        written: Arc<Mutex<Vec<String>>>,
    }

    impl Writer<u32> for Fake {
        fn write(&mut self, entries: Vec<u32>, lost: u64) -> u64 {
            self.go.recv().unwrap();
            if *self.fails.lock().unwrap() {
                return lost + entries.len() as u64;
            }
            let mut written = self.written.lock().unwrap();
            written.extend((lost > 0).then(|| format!("lost {lost}")));
            written.extend(entries.iter().map(u32::to_string));
            0
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn nobody_waits_and_what_is_lost_is_told() {
        let (allow, go) = mpsc::channel();
        let (fails, written) = (Arc::new(Mutex::new(false)), Arc::new(Mutex::new(Vec::new())));
        let fake = Fake { go, fails: Arc::clone(&fails), written: Arc::clone(&written) };
        let sink = Sink::start("test", 30, fake).unwrap();
        // The writer stands still at the first; two more fit, one does not.
        assert_eq!([1, 2, 3, 4].map(|entry| sink.offer(entry, 10)), [true, true, true, false]);
        assert!(!sink.flush(Duration::ZERO), "it stands still");
        (0..8).for_each(|_| allow.send(()).unwrap());
        assert!(sink.flush(LONG));
        *fails.lock().unwrap() = true;
        assert!(sink.offer(5, 30), "there is room again");
        assert!(sink.flush(LONG));
        *fails.lock().unwrap() = false;
        assert!(sink.offer(6, 0));
        (0..8).for_each(|_| allow.send(()).unwrap());
        assert!(sink.flush(LONG));
        let written = written.lock().unwrap();
        let entries: Vec<&String> = written.iter().filter(|it| !it.starts_with("lost")).collect();
        assert_eq!(entries, ["1", "2", "3", "6"]);
        let lost = written.iter().filter_map(|it| it.strip_prefix("lost ")?.parse::<u64>().ok());
        assert_eq!(lost.sum::<u64>(), 2, "{written:?}");
        assert!(!sink.offer(7, 31), "one that can never fit is lost, too");
    }
}
