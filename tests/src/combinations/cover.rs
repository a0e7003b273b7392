//! Chooses combinations so that every two values that go together are played together.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use super::axes::{Combination, LENGTHS, RULES};

const AXES: usize = LENGTHS.len();
/// How many at random are looked at before the best is taken.
const CANDIDATES: usize = 24;

type Values = [u8; AXES];
/// A value of one axis and one of another.
type Pair = (u8, u8, u8, u8);

/// What was chosen, and of how many.
#[derive(Debug)]
pub struct Chosen {
    /// In no order that matters.
    pub combinations: Vec<Combination>,
    /// Pairs of values that go together in some combination; each is in `combinations`.
    pub pairs: usize,
    /// How many combinations make sense.
    pub sensible: usize,
    /// How many do not, by the first rule that says so.
    pub excluded: BTreeMap<&'static str, usize>,
}

/// Chooses at least so many; more if pairs ask for it. The same seed chooses the same.
pub fn choose(seed: u64, at_least: usize) -> Chosen {
    let mut excluded: BTreeMap<&'static str, usize> = RULES.iter().map(|(why, _)| (*why, 0)).collect();
    let mut sensible: Vec<Values> = Vec::new();
    let mut open: BTreeSet<Pair> = BTreeSet::new();
    for values in all() {
        match Combination::of(&values).excluded() {
            Some(why) => *excluded.entry(why).or_default() += 1,
            None => {
                open.extend(pairs(&values));
                sensible.push(values);
            }
        }
    }
    let (total, mut random) = (open.len(), StdRng::seed_from_u64(seed));
    let mut chosen: Vec<Values> = Vec::new();
    let mut taken = HashSet::new();
    // Beyond pairs, three values that were not together yet are worth more than three that were.
    let mut triples = HashSet::new();
    while (!open.is_empty() || chosen.len() < at_least) && chosen.len() < sensible.len() {
        let mut candidates: Vec<Values> = Vec::new();
        if let Some(wanted) = open.iter().nth(random.random_range(0..open.len().max(1))) {
            // What is left may be rare: looked for, not waited for.
            let (a, value_a, b, value_b) = *wanted;
            let fits =
                |values: &&Values| values[usize::from(a)] == value_a && values[usize::from(b)] == value_b;
            let fitting: Vec<&Values> = sensible.iter().filter(fits).collect();
            candidates.extend(fitting.sample(&mut random, CANDIDATES).map(|values| **values));
        } else {
            candidates.extend(sensible.sample(&mut random, CANDIDATES).copied());
        }
        let worth = |values: &Values| {
            let new = pairs(values).filter(|pair| open.contains(pair)).count();
            let further = triples_of(values).filter(|triple| !triples.contains(triple)).count();
            (new, further)
        };
        let best = candidates.into_iter().filter(|values| !taken.contains(values)).max_by_key(worth);
        let Some(best) = best else { continue };
        for pair in pairs(&best) {
            open.remove(&pair);
        }
        triples.extend(triples_of(&best));
        taken.insert(best);
        chosen.push(best);
    }
    Chosen {
        combinations: chosen.iter().map(Combination::of).collect(),
        pairs: total,
        sensible: sensible.len(),
        excluded,
    }
}

fn all() -> impl Iterator<Item = Values> {
    let count: usize = LENGTHS.iter().product();
    (0..count).map(|mut number| {
        let mut values = [0; AXES];
        for (value, length) in values.iter_mut().zip(LENGTHS) {
            *value = (number % length) as u8;
            number /= length;
        }
        values
    })
}

fn pairs(values: &Values) -> impl Iterator<Item = Pair> + use<> {
    let values = *values;
    (0..AXES).flat_map(move |a| (a + 1..AXES).map(move |b| (a as u8, values[a], b as u8, values[b])))
}

fn triples_of(values: &Values) -> impl Iterator<Item = (u8, Pair)> + use<> {
    let values = *values;
    pairs(&values)
        .flat_map(move |pair| (pair.2 + 1..AXES as u8).map(move |c| (c * 16 + values[usize::from(c)], pair)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_that_goes_together_is_chosen_and_nothing_that_does_not() {
        let chosen = choose(1, 300);
        assert!(chosen.combinations.len() >= 300);
        assert!(chosen.combinations.iter().all(|combination| combination.excluded().is_none()));
        let different: BTreeSet<_> = chosen.combinations.iter().collect();
        assert_eq!(different.len(), chosen.combinations.len());
        let excluded: usize = chosen.excluded.values().sum();
        assert_eq!(chosen.sensible + excluded, LENGTHS.iter().product::<usize>());
        for (rule, count) in chosen.excluded {
            assert!(count > 0, "this rule excludes nothing: {rule}");
        }
    }

    #[test]
    fn a_seed_chooses_the_same_again_and_another_one_something_else() {
        let [once, again, other] = [7, 7, 8].map(|seed| choose(seed, 50).combinations);
        assert_eq!(once, again);
        assert_ne!(once, other);
    }
}
