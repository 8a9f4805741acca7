//! Low-rank weight updates, added in f32 as the weights are read.

use std::collections::BTreeMap;

use burn::tensor::TensorData;

/// A low-rank update `up @ down` of a weight `[rows, ...]` viewed as a matrix `[rows, columns]`: a linear layer as is,
/// a convolution with its kernel unrolled, `columns = in * k * k`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, columns]`
    down: Vec<f32>,
    /// `[rows, rank]`, including all scales and weights.
    up: Vec<f32>,
    rank: usize,
}

/// Updates of one model's weights, by name. Several updates of a weight are summed.
pub type Updates = BTreeMap<String, Vec<LowRank>>;

impl LowRank {
    /// Creates the update `scale * up @ down` from `down` `[rank, columns]` and `up` `[rows, rank]`, both row-major.
    pub fn new(down: Vec<f32>, mut up: Vec<f32>, rank: usize, scale: f32) -> Self {
        up.iter_mut().for_each(|value| *value *= scale);
        Self { down, up, rank }
    }

    /// Adds rows of the update, from `first_row` on, to as many rows as `values` holds.
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

/// Adds updates to a tensor and transposes it if `transpose`.
pub(super) fn changed(tensor: TensorData, changes: &[LowRank], first_row: usize, transpose: bool) -> TensorData {
    let shape = tensor.shape().to_vec();
    let mut values: Vec<f32> = tensor.iter::<f32>().collect();
    changes.iter().for_each(|change| change.add_to(&mut values, first_row));
    match (transpose, shape.as_slice()) {
        (true, &[rows, columns]) => TensorData::new(transposed(&values, columns), [columns, rows]),
        _ => TensorData::new(values, shape),
    }
}

/// Transposes a row-major matrix with this many columns.
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
