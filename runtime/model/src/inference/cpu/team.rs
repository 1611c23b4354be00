//! Threads that share the loops of a step. A loop lasts some ten microseconds, so that waking a
//! thread for each would cost more than the loop: between loops the helpers spin, and sleep only
//! when none has come for a while.
//!
//! A loop never waits for a helper that has not joined it. On a busy machine, where a helper may be
//! off its core, the caller simply does more of the work itself.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

/// Spins before a helper lets others have its core, and before it sleeps.
const SPINS: u32 = 2_000;
const YIELDS: u32 = 200;

/// [`Shared::state`] is `epoch << 32 | OPEN | number of helpers that have joined`.
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;

/// The caller's thread and its helpers.
#[derive(Debug)]
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: AtomicU64,
    /// Written while no loop is open and nobody has joined; read only by those who have joined.
    work: UnsafeCell<Work>,
    next: AtomicUsize,
    panicked: AtomicBool,
    stopping: AtomicBool,
    asleep: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

/// A loop's body, without its type.
#[derive(Clone, Copy, Debug)]
struct Work {
    call: unsafe fn(*const (), usize),
    body: *const (),
    count: usize,
}

// SAFETY: `work` is only accessed under the protocol that is told there; the body is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Team {
    /// `threads` in all, the caller's among them.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        unsafe fn nothing(_: *const (), _: usize) {}
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            work: UnsafeCell::new(Work { call: nothing, body: std::ptr::null(), count: 0 }),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let helper = |index: usize| {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("engine-{index}")).spawn(move || shared.help())
        };
        let helpers = (1..threads).map(helper).collect::<Result<_, _>>()?;
        Ok(Self { shared, helpers })
    }

    /// Calls `body` once for each index below `count`, in any order and on any thread. One loop at a
    /// time: `&mut` keeps a second one out.
    pub fn each<F: Fn(usize) + Sync>(&mut self, count: usize, body: F) {
        unsafe fn call<F: Fn(usize)>(body: *const (), index: usize) {
            // SAFETY: `body` is the `F` of the loop that is open, which outlives it.
            unsafe { (*body.cast::<F>())(index) }
        }
        if self.helpers.is_empty() || count < 2 {
            return (0..count).for_each(body);
        }
        self.shared.open(Work { call: call::<F>, body: std::ptr::from_ref(&body).cast(), count });
        let ours = catch_unwind(AssertUnwindSafe(|| self.shared.share()));
        self.shared.close();
        if let Err(panic) = ours {
            std::panic::resume_unwind(panic);
        }
        assert!(!self.shared.panicked.swap(false, Ordering::Relaxed), "a helper's part of the loop panicked");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.wake_all();
        for helper in self.helpers.drain(..) {
            if helper.join().is_err() {
                tracing::warn!("a helper thread of the engine ended by panic");
            }
        }
    }
}

impl Shared {
    fn open(&self, work: Work) {
        // SAFETY: no loop is open, and the last one's `close` waited for all who had joined.
        unsafe { *self.work.get() = work };
        self.next.store(0, Ordering::Relaxed);
        let epoch = (self.state.load(Ordering::Relaxed) >> 32) + 1;
        self.state.store(epoch << 32 | OPEN, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            self.wake_all();
        }
    }

    /// Lets nobody join any more and waits for those who have.
    fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.state.load(Ordering::Acquire) & JOINED > 0 {
            pause(&mut spins);
        }
    }

    /// Takes indices until none is left.
    fn share(&self) {
        // SAFETY: the caller has opened the loop or joined it, so that `work` is not written now.
        let work = unsafe { *self.work.get() };
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= work.count {
                return;
            }
            // SAFETY: `body` belongs to the open loop; see `Team::each`.
            unsafe { (work.call)(work.body, index) };
        }
    }

    fn help(&self) {
        let mut done = 0;
        let mut spins = 0;
        while !self.stopping.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::Acquire);
            if is_new(state, done) {
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    done = state >> 32;
                    if catch_unwind(AssertUnwindSafe(|| self.share())).is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.state.fetch_sub(1, Ordering::Release);
                    spins = 0;
                }
            } else if spins >= SPINS + YIELDS {
                self.doze(done);
                spins = 0;
            } else {
                pause(&mut spins);
            }
        }
    }

    /// Sleeps until a loop opens.
    fn doze(&self, done: u64) {
        let mut guard = self.sleep.lock();
        self.asleep.fetch_add(1, Ordering::SeqCst);
        while !is_new(self.state.load(Ordering::SeqCst), done) && !self.stopping.load(Ordering::SeqCst) {
            self.wake.wait(&mut guard);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake_all(&self) {
        // With the lock held no helper is between its last look and its sleep.
        let _guard = self.sleep.lock();
        self.wake.notify_all();
    }
}

fn is_new(state: u64, done: u64) -> bool {
    state & OPEN > 0 && state >> 32 != done
}

fn pause(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_called_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 5] {
            let mut team = Team::new(threads).unwrap();
            for count in [0, 1, 2, 7, 1000] {
                let calls: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    team.each(count, |index| {
                        calls[index].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 50), "{threads} threads");
            }
        }
    }

    #[test]
    fn helpers_that_have_gone_to_sleep_come_back() {
        let mut team = Team::new(2).unwrap();
        team.each(4, |_| {});
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while team.shared.asleep.load(Ordering::SeqCst) == 0 {
            assert!(std::time::Instant::now() < deadline, "the helper did not go to sleep");
            std::thread::yield_now();
        }
        let caller = std::thread::current().id();
        let helped = AtomicBool::new(false);
        // The caller stays in its first index until the helper has had one.
        team.each(2, |_| {
            if std::thread::current().id() == caller {
                while !helped.load(Ordering::Relaxed) && std::time::Instant::now() < deadline {
                    std::thread::yield_now();
                }
            } else {
                helped.store(true, Ordering::Relaxed);
            }
        });
        assert!(helped.load(Ordering::Relaxed));
    }

    #[test]
    fn a_panic_in_the_loop_reaches_the_caller_and_the_team_goes_on() {
        let mut team = Team::new(3).unwrap();
        let failed = catch_unwind(AssertUnwindSafe(|| team.each(100, |index| assert!(index != 57))));
        assert!(failed.is_err());
        let sum = AtomicUsize::new(0);
        team.each(10, |index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
