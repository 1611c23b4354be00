//! What adapters add to a projection, unmerged: `scale · B (A x)` of each row's own adapter, so that
//! requests of several adapters and of the bare model share one batch and its projections (Chen et al.
//! 2023, "Punica"). A row's numbers are the same bits whatever else is in the batch, as everywhere here.

use super::activations::Activations;
use super::isa::{InstructionSet, Isa, Lanes, dispatch};
use super::matrix::{WIDE, wide_panels};
use super::multiply::{Write, put};
use super::share::Shared;
use super::team::Team;

/// Rows of a batch, one after another, that one adapter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub adapter: usize,
    pub first: usize,
    pub rows: usize,
}

/// One adapter's part in one matrix of a projection.
#[derive(Debug)]
pub struct Pair {
    inputs: usize,
    outputs: usize,
    rank: usize,
    /// Panels of `A [rank, inputs]` and of `scale · B [outputs, rank]`.
    down: Vec<f32>,
    up: Vec<f32>,
    /// Where the matrix's outputs begin in the projection's.
    column: usize,
}

impl Pair {
    /// From `A [rank, inputs]` and `B [outputs, rank]`, row after row.
    pub fn new(a: &[f32], b: &[f32], rank: usize, scale: f32, column: usize) -> Self {
        let (inputs, outputs) = (a.len() / rank, b.len() / rank);
        let down = wide_panels(rank, inputs, |at| a[at]);
        let up = wide_panels(outputs, rank, |at| scale * b[at]);
        Self { inputs, outputs, rank, down, up, column }
    }

    /// Numbers between A and B that a row takes, padded to whole panels.
    fn between(&self) -> usize {
        self.rank.next_multiple_of(WIDE)
    }
}

/// What all adapters add to one projection.
#[derive(Debug, Default)]
pub struct Additions {
    /// By adapter.
    pub pairs: Vec<Vec<Pair>>,
}

/// The output of a projection, `[rows, outputs]`.
pub struct Output<'a> {
    pub numbers: &'a mut [f32],
    pub outputs: usize,
}

/// Rows of a task.
const ROWS: usize = 6;

impl Additions {
    /// Adds to the projection's products of the rows of `x`. `between` is room that is kept.
    pub fn apply(
        &self,
        set: InstructionSet,
        team: &mut Team,
        (x, segments): (&Activations, &[Segment]),
        out: Output<'_>,
        between: &mut Vec<f32>,
    ) {
        let mut tasks = Vec::new();
        let mut room = 0;
        for segment in segments {
            for pair in self.pairs.get(segment.adapter).into_iter().flatten() {
                for first in (0..segment.rows).step_by(ROWS) {
                    let rows = ROWS.min(segment.rows - first);
                    tasks.push(Task { pair, row: segment.first + first, rows, between: room });
                    room += rows * pair.between();
                }
            }
        }
        between.resize(room.max(between.len()), 0.0);
        let (numbers, between) = (Shared::new(out.numbers), Shared::new(between));
        let place = Place { x, numbers, outputs: out.outputs, between };
        team.each(tasks.len(), |index| {
            let (task, place) = (&tasks[index], &place);
            // SAFETY: the set was detected; tasks are different rows or columns, with room of their own.
            unsafe { dispatch!(set, add(task: &Task<'_>, place: &Place<'_>)) }
        });
    }
}

/// Some rows of one adapter and matrix.
struct Task<'a> {
    pair: &'a Pair,
    row: usize,
    rows: usize,
    /// Where its room begins.
    between: usize,
}

/// What all tasks have in common.
struct Place<'a> {
    x: &'a Activations,
    numbers: Shared<f32>,
    outputs: usize,
    between: Shared<f32>,
}

#[inline(always)]
unsafe fn add<I: Isa>(task: &Task<'_>, place: &Place<'_>) {
    // SAFETY: the caller's promises.
    unsafe {
        match task.rows {
            1 => rows::<I, 1>(task, place),
            2 => rows::<I, 2>(task, place),
            3 => rows::<I, 3>(task, place),
            4 => rows::<I, 4>(task, place),
            5 => rows::<I, 5>(task, place),
            _ => rows::<I, 6>(task, place),
        }
    }
}

#[inline(always)]
unsafe fn rows<I: Isa, const M: usize>(task: &Task<'_>, place: &Place<'_>) {
    let Pair { inputs, outputs, rank, down, up, column } = task.pair;
    let stride = task.pair.between();
    // SAFETY: the caller's promises; panels are as long as the sizes say.
    unsafe {
        let between = place.between.slice(task.between, M * stride);
        let x = place.x.values.as_ptr().add(task.row * place.x.columns);
        for (index, panel) in down.chunks_exact(WIDE * inputs).enumerate() {
            let [low, high] = I::wide::<f32, M>(x, place.x.columns, panel);
            for row in 0..M {
                let to = between.as_mut_ptr().add(row * stride + index * WIDE);
                low[row].store(to);
                high[row].store(to.add(WIDE / 2));
            }
        }
        for (index, panel) in up.chunks_exact(WIDE * rank).enumerate() {
            let [low, high] = I::wide::<f32, M>(between.as_ptr(), stride, panel);
            for row in 0..M {
                let (at, width) = (index * WIDE, WIDE.min(outputs - index * WIDE));
                let out = place.numbers.slice((task.row + row) * place.outputs + column + at, width);
                let (first, second) = out.split_at_mut(width.min(WIDE / 2));
                put(first, low[row], Write::Add);
                put(second, high[row], Write::Add);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|index| (((index + seed) * 7919 % 1009) as f32 - 504.0) / 500.0).collect()
    }

    const COLUMNS: usize = 40;
    const OUTPUTS: usize = 37 + 16;

    /// Two adapters: one of both matrices, ranks 5 and 17, one of the second only.
    fn additions() -> Additions {
        let pair = |rank: usize, outputs: usize, column, seed| {
            Pair::new(&values(rank * COLUMNS, seed), &values(outputs * rank, seed + 1), rank, 0.5, column)
        };
        Additions { pairs: vec![vec![pair(5, 37, 0, 1), pair(17, 16, 37, 2)], vec![pair(8, 16, 37, 3)]] }
    }

    fn activations(rows: usize) -> Activations {
        let mut x = Activations::default();
        x.shape(rows, COLUMNS, false);
        x.values.copy_from_slice(&values(rows * COLUMNS, 9));
        x
    }

    fn sums(x: &Activations, segments: &[Segment], set: InstructionSet) -> Vec<f32> {
        let mut numbers = vec![1.0; x.rows * OUTPUTS];
        let out = Output { numbers: &mut numbers, outputs: OUTPUTS };
        additions().apply(set, &mut Team::new(2).unwrap(), (x, segments), out, &mut Vec::new());
        numbers
    }

    /// `1 + 0.5 · B A x` in fp64.
    fn expected(x: &[f32], adapter: usize, output: usize) -> f64 {
        let parts: &[(usize, usize, usize, usize)] = match adapter {
            0 => &[(5, 0, 37, 1), (17, 37, 16, 2)],
            _ => &[(8, 37, 16, 3)],
        };
        let mut sum = 1.0;
        for (rank, column, outputs, seed) in parts {
            if !(*column..column + outputs).contains(&output) {
                continue;
            }
            let (a, b) = (values(rank * COLUMNS, *seed), values(outputs * rank, seed + 1));
            for unit in 0..*rank {
                let inner: f64 = (0..COLUMNS).map(|k| f64::from(a[unit * COLUMNS + k]) * f64::from(x[k])).sum();
                sum += 0.5 * f64::from(b[(output - column) * rank + unit]) * inner;
            }
        }
        sum
    }

    #[test]
    fn each_row_gets_what_its_own_adapter_adds() {
        let x = activations(11);
        let segments = [Segment { adapter: 1, first: 0, rows: 2 }, Segment { adapter: 0, first: 3, rows: 8 }];
        for set in [InstructionSet::Portable, InstructionSet::detect()] {
            let found = sums(&x, &segments, set);
            assert!(found[2 * OUTPUTS..3 * OUTPUTS].iter().all(|value| *value == 1.0), "a row without adapter changed");
            for segment in segments {
                for row in segment.first..segment.first + segment.rows {
                    for output in 0..OUTPUTS {
                        let expected = expected(&x.values[row * COLUMNS..][..COLUMNS], segment.adapter, output);
                        let found = f64::from(found[row * OUTPUTS + output]);
                        assert!((found - expected).abs() < 2e-4, "{set:?} {row} {output}: {found} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_gets_the_same_bits_alone_and_among_others() {
        let x = activations(9);
        let together = sums(&x, &[Segment { adapter: 0, first: 0, rows: 9 }], InstructionSet::detect());
        for row in 0..9 {
            let alone = sums(&x, &[Segment { adapter: 0, first: row, rows: 1 }], InstructionSet::detect());
            assert_eq!(alone[row * OUTPUTS..][..OUTPUTS], together[row * OUTPUTS..][..OUTPUTS], "row {row}");
        }
    }
}
