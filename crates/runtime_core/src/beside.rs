//! A thread beside an engine's own: it works off one job at a time, in moments in which the engine waits for its model.
//!
//! To wake a thread costs the one who wakes it 10 us and more. So this one looks for a job by itself as long as jobs come,
//! four times in the time from one to the next, and has to be woken only after a pause; and whoever needs a job done
//! gets it back where it has not been begun.
//!
//! | operation | progress | allocates | worst case |
//! |---|---|---|---|
//! | [`Beside::post`] | a lock that is held for a few instructions | no | after a pause, waking the thread |
//! | [`Beside::fetch`] | blocks while the thread is at the job | no | what is left of it; two seconds where the thread is lost |
//! | [`Beside::start`] | blocking, cold | yes | |

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whoever waits longer has lost the thread.
const PATIENCE: Duration = Duration::from_secs(2);
/// The thread looks for a job every so often, and for so long after one.
const LOOK_EVERY: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(5)];
const LOOKS: Duration = Duration::from_millis(100);

/// Where a job is.
enum Place<T> {
    Nowhere,
    /// Handed over, and nobody has begun.
    Posted(T),
    /// The thread is at it.
    Taken,
    Done(T),
    /// Nobody posts any more, or the thread has panicked.
    Closed,
}

struct Desk<T> {
    place: Place<T>,
    /// Whether the thread looks by itself.
    looks: bool,
}

struct Between<T> {
    desk: Mutex<Desk<T>>,
    changed: Condvar,
}

impl<T> Between<T> {
    fn desk(&self) -> MutexGuard<'_, Desk<T>> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.desk().place = Place::Closed;
        self.changed.notify_all();
    }
}

/// A job that was handed over.
#[derive(Debug)]
pub enum Fetched<T> {
    /// As the thread has left it.
    Done(T),
    /// Nobody has begun with it.
    Undone(T),
    /// The thread has panicked or does not answer, or nothing was handed over.
    Lost,
}

/// A thread that works off one job at a time; it ends when this goes.
pub struct Beside<T> {
    between: Arc<Between<T>>,
    busy: bool,
}

impl<T> std::fmt::Debug for Beside<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Beside").field("busy", &self.busy).finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Beside<T> {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// The system has no thread to give.
    pub fn start(name: &str, work: impl FnMut(&mut T) + Send + 'static) -> std::io::Result<Self> {
        let desk = Mutex::new(Desk { place: Place::Nowhere, looks: false });
        let between = Arc::new(Between { desk, changed: Condvar::new() });
        let theirs = Closes(Arc::clone(&between));
        std::thread::Builder::new().name(name.into()).spawn(move || work_off_all(&theirs, work))?;
        Ok(Self { between, busy: false })
    }
}

impl<T> Beside<T> {
    /// Whether a job has been handed over and not been fetched.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Hands a job over, which has to be fetched before the next one: a second one is dropped.
    pub fn post(&mut self, job: T) {
        self.busy = true;
        let mut desk = self.between.desk();
        if matches!(desk.place, Place::Nowhere) {
            desk.place = Place::Posted(job);
            if !desk.looks {
                self.between.changed.notify_all();
            }
        }
    }

    /// The job that was handed over. Waits while the thread is at it.
    pub fn fetch(&mut self) -> Fetched<T> {
        self.busy = false;
        let mut desk = self.between.desk();
        let mut until = None;
        loop {
            match std::mem::replace(&mut desk.place, Place::Nowhere) {
                Place::Done(job) => return Fetched::Done(job),
                Place::Posted(job) => return Fetched::Undone(job),
                Place::Nowhere => return Fetched::Lost,
                Place::Closed => {
                    desk.place = Place::Closed;
                    return Fetched::Lost;
                }
                Place::Taken => {
                    desk.place = Place::Taken;
                    let until = *until.get_or_insert_with(|| Instant::now() + PATIENCE);
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Fetched::Lost;
                    }
                    let waited = self.between.changed.wait_timeout(desk, left);
                    desk = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Ends the thread; whoever fetches later gets nothing, as after a panic.
    pub fn close(&self) {
        self.between.close();
    }
}

impl<T> Drop for Beside<T> {
    fn drop(&mut self) {
        self.close();
    }
}

/// Tells the other side when the thread ends, also where it panics.
struct Closes<T>(Arc<Between<T>>);

impl<T> Drop for Closes<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// What the thread does.
fn work_off_all<T>(Closes(between): &Closes<T>, mut work: impl FnMut(&mut T)) {
    let mut desk = between.desk();
    let (mut last, mut every) = (Instant::now(), LOOK_EVERY[0]);
    loop {
        match std::mem::replace(&mut desk.place, Place::Nowhere) {
            Place::Posted(mut job) => {
                desk.place = Place::Taken;
                drop(desk);
                work(&mut job);
                desk = between.desk();
                if !matches!(desk.place, Place::Taken) {
                    return;
                }
                desk.place = Place::Done(job);
                between.changed.notify_all();
                let now = Instant::now();
                every = ((now - last) / 4).clamp(LOOK_EVERY[0], LOOK_EVERY[1]);
                last = now;
            }
            Place::Closed => return,
            place => desk.place = place,
        }
        desk.looks = last.elapsed() < LOOKS;
        desk = if desk.looks {
            between.changed.wait_timeout(desk, every).unwrap_or_else(PoisonError::into_inner).0
        } else {
            between.changed.wait(desk).unwrap_or_else(PoisonError::into_inner)
        };
    }
}
