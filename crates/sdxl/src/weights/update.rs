//! Low-rank changes to weights, added in f32 while the weights are read.

use std::collections::BTreeMap;

use burn::tensor::TensorData;

/// A change `up @ down` to a weight `[rows, ...]` that is seen as a matrix `[rows, columns]`: a linear layer as it is, a
/// convolution with its kernel unrolled, `columns = in * k * k`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, columns]`
    down: Vec<f32>,
    /// `[rows, rank]`, with all scales and weights in it.
    up: Vec<f32>,
    rank: usize,
}

/// The changes to the weights of one model, by their names: those of one weight add up.
pub type Updates = BTreeMap<String, Vec<LowRank>>;

impl LowRank {
    /// The change `scale * up @ down`, `down` being `[rank, columns]` and `up` `[rows, rank]`, both rows first.
    pub fn new(down: Vec<f32>, mut up: Vec<f32>, rank: usize, scale: f32) -> Self {
        up.iter_mut().for_each(|value| *value *= scale);
        Self { down, up, rank }
    }

    /// Adds rows of the change, from `first_row` on, to `values`: as many as it holds.
    pub fn add_to(&self, values: &mut [f32], first_row: usize) {
        if self.rank == 0 || self.down.is_empty() {
            return;
        }
        let columns = self.down.len() / self.rank;
        let mut change = vec![0.0; columns];
        let factors = self.up.chunks_exact(self.rank).skip(first_row);
        for (row, factors) in values.chunks_exact_mut(columns).zip(factors) {
            change.fill(0.0);
            for (&factor, down) in factors.iter().zip(self.down.chunks_exact(columns)) {
                change.iter_mut().zip(down).for_each(|(sum, value)| *sum += factor * value);
            }
            row.iter_mut().zip(&change).for_each(|(value, change)| *value += change);
        }
    }
}

/// A tensor with its changes added, transposed where `transpose` says so.
pub(super) fn changed(tensor: TensorData, changes: &[LowRank], first_row: usize, transpose: bool) -> TensorData {
    let shape = tensor.shape().to_vec();
    let mut values: Vec<f32> = tensor.iter::<f32>().collect();
    changes.iter().for_each(|change| change.add_to(&mut values, first_row));
    match (transpose, shape.as_slice()) {
        (true, &[rows, columns]) => TensorData::new(transposed(&values, columns), [columns, rows]),
        _ => TensorData::new(values, shape),
    }
}

/// The transpose of a matrix with this many columns, rows first.
pub(crate) fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns.max(1);
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_rows_of_the_change_can_be_added() {
        // [[1], [2], [3]] @ [[10, 20]] * 0.5
        let change = LowRank::new(vec![10.0, 20.0], vec![1.0, 2.0, 3.0], 1, 0.5);
        let mut all = vec![1.0; 6];
        change.add_to(&mut all, 0);
        assert_eq!(all, [6.0, 11.0, 11.0, 21.0, 16.0, 31.0]);
        let mut some = vec![0.0; 2];
        change.add_to(&mut some, 1);
        assert_eq!(some, [10.0, 20.0]);
    }

    #[test]
    fn ranks_add_up() {
        // [[1, 2]] @ [[1, 0], [0, 3]]
        let change = LowRank::new(vec![1.0, 0.0, 0.0, 3.0], vec![1.0, 2.0], 2, 1.0);
        let mut row = vec![0.0; 2];
        change.add_to(&mut row, 0);
        assert_eq!(row, [1.0, 6.0]);
    }
}
