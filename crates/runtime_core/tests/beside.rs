//! The thread beside: every job comes back once, whoever has done it, and a thread that is lost is noticed.

use std::sync::mpsc::channel;
use std::thread::sleep;
use std::time::Duration;

use runtime_core::beside::{Beside, Fetched};

#[test]
fn every_job_comes_back_once_done_or_as_it_was() {
    let mut beside = Beside::start("test", |job: &mut (u64, bool)| job.1 = true).unwrap();
    let (mut done, mut undone) = (0, 0);
    for n in 0..2_000u64 {
        beside.post((n, false));
        assert!(beside.is_busy());
        // At once, while it looks, and some times after it has stopped looking.
        match n % 50 {
            49 if n % 500 == 499 => sleep(Duration::from_millis(120)),
            40.. => sleep(Duration::from_micros(n * 37 % 3_000)),
            _ => {}
        }
        match beside.fetch() {
            Fetched::Done(job) => {
                assert_eq!(job, (n, true));
                done += 1;
            }
            Fetched::Undone(job) => {
                assert_eq!(job, (n, false));
                undone += 1;
            }
            Fetched::Lost => panic!("job {n} is lost"),
        }
        assert!(!beside.is_busy());
    }
    assert!(done > 0 && undone > 0, "{done} done, {undone} not");
}

#[test]
fn whoever_needs_a_job_waits_while_the_thread_is_at_it() {
    let (began, begins) = channel();
    let mut beside = Beside::start("test", move |job: &mut u32| {
        began.send(()).unwrap();
        sleep(Duration::from_millis(50));
        *job += 1;
    })
    .unwrap();
    beside.post(1);
    begins.recv().unwrap();
    assert!(matches!(beside.fetch(), Fetched::Done(2)));
}

#[test]
fn the_thread_ends_with_its_owner() {
    struct Tells(std::sync::mpsc::Sender<()>);
    impl Drop for Tells {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }
    let (ended, ends) = channel();
    let tells = Tells(ended);
    let beside = Beside::start("test", move |(): &mut ()| {
        let _ = &tells;
    })
    .unwrap();
    assert!(ends.recv_timeout(Duration::from_millis(20)).is_err());
    drop(beside);
    ends.recv_timeout(Duration::from_secs(10)).unwrap();
}

#[test]
fn a_thread_that_panics_is_noticed_at_once() {
    let (began, begins) = channel();
    let mut beside = Beside::start("test", move |(): &mut ()| {
        began.send(()).unwrap();
        panic!("as a test");
    })
    .unwrap();
    beside.post(());
    begins.recv().unwrap();
    assert!(matches!(beside.fetch(), Fetched::Lost));
    beside.post(());
    assert!(matches!(beside.fetch(), Fetched::Lost));
}

#[test]
fn nothing_is_fetched_where_nothing_was_posted() {
    let mut beside = Beside::start("test", |(): &mut ()| {}).unwrap();
    assert!(matches!(beside.fetch(), Fetched::Lost));
    beside.close();
    beside.post(());
    assert!(matches!(beside.fetch(), Fetched::Lost));
}
