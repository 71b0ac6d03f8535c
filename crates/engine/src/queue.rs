//! Who waits. Clients take turns, so that one that asks for much does not hold up the others.

use std::collections::{BTreeMap, VecDeque};

/// One queue for each client, and whose turn it is.
pub(crate) struct FairQueue<T> {
    clients: BTreeMap<u64, VecDeque<T>>,
    /// Clients with something in their queue, the next first.
    turns: VecDeque<u64>,
    len: usize,
}

/// What to do with the item that was offered.
pub(crate) enum Offer<T> {
    /// It is taken; the next client's turn.
    Taken,
    /// Not now; the client is passed over this time.
    Later(T),
    /// Not now, and no other before it.
    Stop(T),
}

impl<T> FairQueue<T> {
    pub(crate) fn new() -> Self {
        Self {
            clients: BTreeMap::new(),
            turns: VecDeque::new(),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn push(&mut self, client: u64, item: T) {
        let queue = self.clients.entry(client).or_default();
        if queue.is_empty() {
            self.turns.push_back(client);
        }
        queue.push_back(item);
        self.len += 1;
    }

    /// Offers the first item of each client in turn until none is taken any more.
    pub(crate) fn offer(&mut self, mut take: impl FnMut(T) -> Offer<T>) {
        let mut passed_over = 0;
        while passed_over < self.turns.len() {
            let client = self.turns[passed_over];
            let Some(queue) = self.clients.get_mut(&client) else {
                return;
            };
            let Some(item) = queue.pop_front() else {
                return;
            };
            match take(item) {
                Offer::Taken => {
                    self.len -= 1;
                    self.turns.remove(passed_over);
                    if queue.is_empty() {
                        self.clients.remove(&client);
                    } else {
                        self.turns.push_back(client);
                    }
                }
                Offer::Later(item) => {
                    queue.push_front(item);
                    passed_over += 1;
                }
                Offer::Stop(item) => {
                    queue.push_front(item);
                    return;
                }
            }
        }
    }

    /// Takes out the first item that is wanted.
    pub(crate) fn remove(&mut self, is_wanted: impl Fn(&T) -> bool) -> Option<T> {
        for (client, queue) in &mut self.clients {
            let Some(item) = queue
                .iter()
                .position(&is_wanted)
                .and_then(|idx| queue.remove(idx))
            else {
                continue;
            };
            self.len -= 1;
            if queue.is_empty() {
                let client = *client;
                self.clients.remove(&client);
                self.turns.retain(|&c| c != client);
            }
            return Some(item);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(queue: &mut FairQueue<u32>, n: usize) -> Vec<u32> {
        let mut taken = Vec::new();
        queue.offer(|item| {
            if taken.len() == n {
                return Offer::Stop(item);
            }
            taken.push(item);
            Offer::Taken
        });
        taken
    }

    #[test]
    fn clients_take_turns() {
        let mut queue = FairQueue::new();
        (0..5).for_each(|i| queue.push(1, 10 + i));
        (0..2).for_each(|i| queue.push(2, 20 + i));
        assert_eq!(take(&mut queue, 2), [10, 20]);
        queue.push(3, 30);
        assert_eq!(queue.len(), 6);
        assert_eq!(take(&mut queue, 9), [11, 21, 30, 12, 13, 14]);
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn one_that_cannot_go_yet_does_not_hold_up_other_clients() {
        let mut queue = FairQueue::new();
        for (client, item) in [(1, 10), (1, 11), (2, 20), (2, 21)] {
            queue.push(client, item);
        }
        let mut taken = Vec::new();
        queue.offer(|item| {
            if item == 10 {
                return Offer::Later(item);
            }
            taken.push(item);
            Offer::Taken
        });
        assert_eq!(taken, [20, 21]);
        assert_eq!(take(&mut queue, 9), [10, 11], "in order within a client");
    }

    #[test]
    fn an_item_can_leave_from_anywhere() {
        let mut queue = FairQueue::new();
        for (client, item) in [(1, 10), (1, 11), (2, 20)] {
            queue.push(client, item);
        }
        assert_eq!(queue.remove(|&i| i == 20), Some(20));
        assert_eq!(queue.remove(|&i| i == 20), None);
        assert_eq!(queue.remove(|&i| i == 11), Some(11));
        assert_eq!((take(&mut queue, 9), queue.len()), (vec![10], 0));
    }
}
