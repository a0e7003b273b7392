//! One value as a rule, several at times: what has the same address or name.

use std::slice;
use std::sync::Arc;

/// At least one value, the best first.
#[derive(Debug, Clone)]
pub(super) enum Several<T> {
    One(T),
    More(Arc<Vec<T>>),
}

impl<T: Clone> Several<T> {
    pub(super) fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => slice::from_ref(value),
            Self::More(values) => values,
        }
    }

    /// Adds `value`, in the place of one that `is_it`, or before the first that it comes `before`.
    pub(super) fn put(&mut self, value: T, is_it: impl Fn(&T) -> bool, before: impl Fn(&T) -> bool) {
        let mut all = self.as_slice().to_vec();
        all.retain(|other| !is_it(other));
        let at = all.iter().position(before).unwrap_or(all.len());
        all.insert(at, value);
        *self = Self::of(all).expect("one was just added");
    }

    /// Without those that `is_it`; nothing if none is left.
    pub(super) fn without(&self, is_it: impl Fn(&T) -> bool) -> Option<Self> {
        Self::of(self.as_slice().iter().filter(|other| !is_it(other)).cloned().collect())
    }

    fn of(mut all: Vec<T>) -> Option<Self> {
        match all.len() {
            0 | 1 => all.pop().map(Self::One),
            _ => Some(Self::More(Arc::new(all))),
        }
    }
}
