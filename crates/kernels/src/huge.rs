//! Memory for what is read from front to back again and again: weights, keys and values.
//!
//! Such memory is read as fast as its addresses are translated. In pages of 2 MB there is one
//! translation where there were five hundred, which on a virtual machine makes reading half as
//! fast again or more. So pieces are cut from large maps for which such pages are asked; where
//! the system gives none, they are ordinary memory.

use bytemuck::Pod;
use memmap2::MmapMut;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The size of a large page.
const PAGE: usize = 2 << 20;
/// Where pieces start: at a cache line.
const ALIGN: usize = 64;

/// A place that pieces come from. Those of one place should live about as long as each other:
/// a map is given back when its last piece is dropped. [`Recycled`] is for those that do not.
pub(crate) struct Arena {
    /// Bytes of a map; larger pieces have one of their own.
    map_bytes: usize,
    current: Mutex<Option<(Arc<Map>, usize)>>,
}

struct Map {
    /// Keeps the memory.
    _map: MmapMut,
    start: *mut u8,
    len: usize,
}
// SAFETY: the memory is only reached through pieces, which do not overlap.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(len: usize) -> Self {
        let mut map = MmapMut::map_anon(len + PAGE).expect("there is memory for the model");
        #[cfg(target_os = "linux")]
        {
            // Without large pages it is only slower.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        let skipped = map.as_ptr().align_offset(PAGE).min(PAGE);
        Self {
            start: map.as_mut_ptr().wrapping_add(skipped),
            len,
            _map: map,
        }
    }
}

impl Arena {
    pub(crate) const fn new(map_bytes: usize) -> Self {
        Self {
            map_bytes,
            current: Mutex::new(None),
        }
    }

    /// The same values in a piece of its own.
    pub(crate) fn copy<T: Pod>(&self, values: &[T]) -> Piece<T> {
        let mut piece = self.zeroed(values.len());
        piece.copy_from_slice(values);
        piece
    }

    /// `n` zeros.
    pub(crate) fn zeroed<T: Pod>(&self, n: usize) -> Piece<T> {
        assert!(align_of::<T>() <= ALIGN, "a piece starts at a cache line");
        let bytes = (n * size_of::<T>()).next_multiple_of(ALIGN);
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |(map, used): &(Arc<Map>, usize)| map.len - used >= bytes;
        if !current.as_ref().is_some_and(fits) {
            let len = self.map_bytes.max(bytes).next_multiple_of(PAGE);
            *current = Some((Arc::new(Map::new(len)), 0));
        }
        let (map, used) = current.as_mut().expect("a map was made above");
        let start = map.start.wrapping_add(*used).cast();
        *used += bytes;
        let piece = Piece {
            start,
            len: n,
            map: Arc::clone(map),
        };
        // What is left of a map must not keep it alive when its pieces are gone.
        if map.len == *used {
            *current = None;
        }
        piece
    }
}

/// Pieces of an arena that come and go in any order. A map is given back only as a whole, so one piece that stays
/// would keep its map from use; what is let go of is therefore handed out again, from the fullest map first, and there
/// are never more maps than the most pieces at one time needed.
pub(crate) struct Recycled<T> {
    arena: Arena,
    /// By the address of their map.
    spare: Mutex<BTreeMap<usize, Vec<Piece<T>>>>,
    /// Most spare pieces that are kept where whole maps of them could be given back.
    keep: usize,
}

impl<T: Pod> Recycled<T> {
    pub(crate) const fn new(arena: Arena, keep: usize) -> Self {
        Self {
            arena,
            spare: Mutex::new(BTreeMap::new()),
            keep,
        }
    }

    fn spare(&self) -> MutexGuard<'_, BTreeMap<usize, Vec<Piece<T>>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece of `n` values that may be anything.
    pub(crate) fn take(&self, n: usize) -> Piece<T> {
        let mut spare = self.spare();
        let fits = |piece: &Piece<T>| piece.len == n;
        let fullest = (spare.iter())
            .filter_map(|(map, pieces)| Some((pieces.len(), *map, pieces.iter().position(fits)?)))
            .min();
        let Some((left, map, idx)) = fullest else {
            drop(spare);
            return self.arena.zeroed(n);
        };
        let pieces = spare.get_mut(&map).expect("it was found above");
        let piece = pieces.swap_remove(idx);
        if left == 1 {
            spare.remove(&map);
        }
        piece
    }

    /// Takes a piece back, and gives back maps of which nothing is in use while there are pieces enough without them.
    pub(crate) fn give(&self, piece: Piece<T>) {
        let mut spare = self.spare();
        let map = piece.map.start.addr();
        spare.entry(map).or_default().push(piece);
        // The arena holds the map that it cuts from, too.
        let unused = |pieces: &Vec<Piece<T>>| {
            (pieces.first()).is_some_and(|piece| Arc::strong_count(&piece.map) == pieces.len())
        };
        while spare.values().map(Vec::len).sum::<usize>() > self.keep
            && let Some((&map, _)) = spare.iter().find(|(_, pieces)| unused(pieces))
        {
            spare.remove(&map);
        }
    }
}

/// Weights of all models.
pub(crate) static WEIGHTS: Arena = Arena::new(32 << 20);

/// A slice of its own in a shared map.
pub(crate) struct Piece<T> {
    start: *mut T,
    len: usize,
    map: Arc<Map>,
}
// SAFETY: a piece owns its part of the map.
unsafe impl<T: Send> Send for Piece<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Piece<T> {}

impl<T: Pod> Deref for Piece<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        debug_assert!(self.start.addr() - self.map.start.addr() <= self.map.len);
        // SAFETY: `Arena::zeroed` gave these bytes, aligned and inside the map, to this piece
        // alone; the map began as zeros and any bits are a `T`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T: Pod> DerefMut for Piece<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as `deref`, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T> fmt::Debug for Piece<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Piece")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_aligned_and_apart() {
        let arena = Arena::new(3 << 20);
        let mut pieces: Vec<Piece<u32>> = (0..40)
            .map(|i| arena.zeroed(1 + i * 7919 * (1 + i / 39 * 10)))
            .collect();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.iter().all(|&x| x == 0));
            assert_eq!(piece.as_ptr().addr() % ALIGN, 0);
            piece.fill(i as u32 + 1);
        }
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.iter().all(|&x| x == i as u32 + 1));
        }
        assert!(arena.zeroed::<u32>(0).is_empty());
    }

    /// Three of its pieces fill a map.
    fn recycled(keep: usize) -> (Recycled<u32>, usize) {
        (Recycled::new(Arena::new(2 << 20), keep), (600 << 10) / 4)
    }

    fn maps<'a>(pieces: impl Iterator<Item = &'a Piece<u32>>) -> std::collections::BTreeSet<usize> {
        pieces.map(|piece| piece.map.start.addr()).collect()
    }

    #[test]
    fn memory_does_not_grow_with_time() {
        let (recycled, n) = recycled(4);
        let mut held: Vec<_> = (0..60).map(|_| recycled.take(n)).collect();
        assert_eq!(maps(held.iter()).len(), 20);
        let mut draw = 1_usize;
        for _ in 0..50 {
            for _ in 0..30 {
                draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                recycled.give(held.swap_remove((draw >> 33) % held.len()));
            }
            let spare = recycled.spare();
            let all = maps(held.iter().chain(spare.values().flatten()));
            assert!(all.len() <= 20, "{} maps", all.len());
            drop(spare);
            held.extend((0..30).map(|_| recycled.take(n)));
        }
    }

    #[test]
    fn whole_maps_are_given_back_and_pieces_are_apart() {
        let (recycled, n) = recycled(4);
        let mut held: Vec<_> = (0..9).map(|_| recycled.take(n)).collect();
        held.drain(1..).for_each(|piece| recycled.give(piece));
        let n_spare = recycled.spare().values().map(Vec::len).sum::<usize>();
        assert!(n_spare <= 5, "{n_spare}");
        held.push(recycled.take(n / 2));
        held.extend((0..9).map(|_| recycled.take(n)));
        for (i, piece) in held.iter_mut().enumerate() {
            piece.fill(i as u32);
        }
        for (i, piece) in held.iter().enumerate() {
            assert!(piece.iter().all(|&x| x == i as u32));
        }
    }
}
