//! Work on many blocks at once: each is a task of its own, so that the number of threads changes no bit.

use parking_lot::Mutex;

/// `work` of every item, in their order, by this thread and up to `threads - 1` more.
pub fn map<T: Send, R: Send>(threads: usize, items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let threads = threads.min(items.len());
    if threads <= 1 {
        return items.into_iter().map(work).collect();
    }
    let waiting = Mutex::new(items.into_iter().enumerate());
    let take = || {
        let mut done = Vec::new();
        loop {
            let next = waiting.lock().next();
            let Some((index, item)) = next else { return done };
            done.push((index, work(item)));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(take)).collect();
        let mut done = take();
        for other in others {
            // A panic of a task is one of the caller's.
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Threads for it: those that torch computes with.
pub fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_whatever_the_threads() {
        for threads in [0, 1, 3, 100] {
            let squares = map(threads, (0..50u64).collect(), |number| number * number);
            assert_eq!(squares, (0..50).map(|number| number * number).collect::<Vec<u64>>());
        }
        assert!(map(4, Vec::<u8>::new(), |byte| byte).is_empty());
    }

    #[test]
    #[should_panic(expected = "the task's own words")]
    fn a_task_that_panics_is_heard_of() {
        map(4, (0..8).collect(), |number: u32| assert!(number != 5, "the task's own words"));
    }
}
