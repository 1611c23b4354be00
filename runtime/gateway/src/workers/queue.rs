//! Who waits, in which order: what has lost its worker first, then by priority, and among equals one
//! from each key in turn, so that a key with many requests holds up nobody else.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

/// A queue that is fair between keys. What it holds is bounded by its user.
#[derive(Debug)]
pub struct FairQueue<T> {
    /// Ahead of all others, in order.
    first: VecDeque<T>,
    /// By priority, the highest first.
    classes: BTreeMap<Reverse<i32>, Class<T>>,
    len: usize,
}

/// What waits with one priority: keys in the order of their turns, each with its requests in order.
type Class<T> = VecDeque<(String, VecDeque<T>)>;

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { first: VecDeque::new(), classes: BTreeMap::new(), len: 0 }
    }
}

impl<T> FairQueue<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn push(&mut self, priority: i32, key: &str, item: T) {
        let class = self.classes.entry(Reverse(priority)).or_default();
        match class.iter_mut().find(|(other, _)| other == key) {
            Some((_, items)) => items.push_back(item),
            None => class.push_back((key.to_owned(), VecDeque::from([item]))),
        }
        self.len += 1;
    }

    /// Ahead of all others.
    pub fn push_first(&mut self, item: T) {
        self.first.push_front(item);
        self.len += 1;
    }

    /// Takes out, in order, what `take` accepts, until it stops.
    pub fn drain(&mut self, mut take: impl FnMut(&T) -> Taken) {
        let mut kept = VecDeque::new();
        while let Some(item) = self.first.pop_front() {
            match take(&item) {
                Taken::Yes => self.len -= 1,
                Taken::Not => kept.push_back(item),
                Taken::Stop => {
                    kept.push_back(item);
                    kept.append(&mut self.first);
                    self.first = kept;
                    return;
                }
            }
        }
        self.first = kept;
        self.drain_classes(&mut take);
    }

    fn drain_classes(&mut self, take: &mut impl FnMut(&T) -> Taken) {
        for class in self.classes.values_mut() {
            while let Some((_, items)) = class.front_mut() {
                match items.front().map(&mut *take) {
                    Some(Taken::Yes) => {
                        items.pop_front();
                        self.len -= 1;
                        next_turn(class);
                    }
                    Some(Taken::Not | Taken::Stop) => return,
                    None => next_turn(class),
                }
            }
        }
    }

    /// How many wait with a lower priority.
    pub fn count_below(&self, priority: i32) -> usize {
        let lower = self.classes.iter().filter(|(Reverse(other), _)| *other < priority);
        lower.flat_map(|(_, class)| class).map(|(_, items)| items.len()).sum()
    }

    /// Takes out the youngest of the key with most waiting, of the lowest priority that is below `priority`.
    pub fn evict_below(&mut self, priority: i32) -> Option<T> {
        let (_, class) =
            self.classes.iter_mut().rev().find(|(Reverse(other), class)| {
                *other < priority && class.iter().any(|(_, items)| !items.is_empty())
            })?;
        let (_, items) = class.iter_mut().max_by_key(|(_, items)| items.len())?;
        let item = items.pop_back()?;
        self.len -= 1;
        Some(item)
    }

    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.first.retain(&keep);
        for class in self.classes.values_mut() {
            class.iter_mut().for_each(|(_, items)| items.retain(&keep));
            class.retain(|(_, items)| !items.is_empty());
        }
        self.classes.retain(|_, class| !class.is_empty());
        let waiting = self.classes.values().flatten().map(|(_, items)| items.len());
        self.len = self.first.len() + waiting.sum::<usize>();
    }
}

/// What becomes of an item that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    Yes,
    /// It stays because no worker fits it; those behind it may still go.
    Not,
    /// It stays, and so do all behind it.
    Stop,
}

/// The key that was served goes behind the others, or away if it has nothing more.
fn next_turn<T>(class: &mut Class<T>) {
    if let Some((key, items)) = class.pop_front()
        && !items.is_empty()
    {
        class.push_back((key, items));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all<T: Copy>(queue: &mut FairQueue<T>) -> Vec<T> {
        let mut taken = Vec::new();
        queue.drain(|item| {
            taken.push(*item);
            Taken::Yes
        });
        taken
    }

    #[test]
    fn keys_take_turns_within_a_priority() {
        let mut queue = FairQueue::default();
        for (priority, key, item) in [(0, "a", 1), (0, "a", 2), (0, "a", 3), (0, "b", 4), (5, "c", 5), (0, "b", 6)] {
            queue.push(priority, key, item);
        }
        queue.push_first(7);
        assert_eq!(all(&mut queue), [7, 5, 1, 4, 2, 6, 3]);
        assert!(queue.is_empty());
    }

    #[test]
    fn turns_go_on_where_they_ended() {
        let mut queue = FairQueue::default();
        for item in 0..4 {
            queue.push(0, if item < 3 { "a" } else { "b" }, item);
        }
        let mut room = 1;
        let mut one = |item: &i32, taken: &mut Vec<i32>| {
            room -= 1;
            if room < 0 {
                return Taken::Stop;
            }
            taken.push(*item);
            Taken::Yes
        };
        let mut taken = Vec::new();
        queue.drain(|item| one(item, &mut taken));
        assert_eq!(taken, [0]);
        assert_eq!(all(&mut queue), [3, 1, 2]);
    }

    #[test]
    fn one_that_fits_no_worker_does_not_hold_up_the_others() {
        let mut queue = FairQueue::default();
        queue.push(0, "a", 3);
        queue.push_first(2);
        queue.push_first(1);
        let mut taken = Vec::new();
        queue.drain(|item| match item {
            1 => Taken::Not,
            item => {
                taken.push(*item);
                Taken::Yes
            }
        });
        assert_eq!(taken, [2, 3]);
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn the_least_urgent_makes_room_the_youngest_of_the_greediest_key_first() {
        let mut queue = FairQueue::default();
        for (priority, key, item) in [(1, "a", 1), (0, "b", 2), (0, "b", 3), (0, "c", 4)] {
            queue.push(priority, key, item);
        }
        assert_eq!((queue.count_below(0), queue.count_below(1), queue.count_below(2)), (0, 3, 4));
        assert_eq!(queue.evict_below(0), None);
        assert_eq!(queue.evict_below(2), Some(3));
        assert_eq!(queue.len(), 3);
        assert!(queue.evict_below(2).is_some() && queue.evict_below(2).is_some());
        assert_eq!(queue.evict_below(2), Some(1));
        assert_eq!(queue.evict_below(2), None);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_doubled_and_no_key_waits_for_more_than_one_turn_of_the_others(
            pushed in prop::collection::vec((0i32..3, 0u8..4), 0..60),
            removed in prop::collection::hash_set(0usize..60, 0..20),
        ) {
            let mut queue = FairQueue::default();
            for (item, (priority, key)) in pushed.iter().enumerate() {
                queue.push(*priority, &key.to_string(), item);
            }
            queue.retain(|item| !removed.contains(item));
            let count = queue.len();
            let taken = all(&mut queue);
            prop_assert_eq!(taken.len(), count);
            prop_assert!(queue.is_empty());
            let mut sorted = taken.clone();
            sorted.sort_unstable();
            let left: Vec<_> = (0..pushed.len()).filter(|item| !removed.contains(item)).collect();
            prop_assert_eq!(sorted, left);
            // Between two of one key, each other key that waits is served exactly once.
            for window in taken.windows(2) {
                let (first, second) = (pushed[window[0]], pushed[window[1]]);
                prop_assert!(first.0 >= second.0);
                let others_wait = taken.iter().skip_while(|item| **item != window[1])
                    .any(|item| pushed[*item].0 == first.0 && pushed[*item].1 != first.1);
                prop_assert!(first != second || !others_wait);
            }
        }
    }
}
