//! Flat buckets: parameters packed into a few long tensors instead of hundreds of short ones.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Device, Tensor};

/// Minimum number of elements in a bucket: 16 MiB in f32, long enough to use the bandwidth, short enough to have
/// several in flight.
const LEAST_NUMBERS: usize = 4 << 20;

/// Minimum number of elements in each rank's part of a bucket: 1 MiB in f32. A bucket takes one hop per rank whatever
/// its length; from 16 ranks on, the hops of shorter buckets would take longer than their bytes.
const PART_NUMBERS: usize = 256 << 10;

/// Returns the minimum number of elements in a bucket of `parts` parts. A single larger parameter is its own bucket.
pub(super) fn bucket_numbers(parts: usize) -> usize {
    LEAST_NUMBERS.max(parts.saturating_mul(PART_NUMBERS))
}

/// Returns the minimum size in bytes of a bucket shared by `ranks`.
pub fn bucket_bytes(ranks: u64) -> u64 {
    let parts = usize::try_from(ranks).unwrap_or(usize::MAX);
    4 * bucket_numbers(parts) as u64
}

/// Whole parameters, concatenated, that are reduced, stepped and gathered as one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bucket {
    /// Paths and lengths.
    parameters: Vec<(String, usize)>,
    /// Total length, including the zeros at the end that make the ranks' parts equal.
    length: usize,
}

/// Cuts parameters into buckets of at least `numbers` elements (the last may be shorter), each divisible into `parts`
/// equal parts. The cut depends only on the parameters, so all ranks make the same one.
pub(super) fn cut(parameters: impl IntoIterator<Item = (String, usize)>, numbers: usize, parts: usize) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    for parameter in parameters {
        match buckets.last_mut() {
            Some(bucket) if bucket.length < numbers => {
                bucket.length += parameter.1;
                bucket.parameters.push(parameter);
            }
            _ => buckets.push(Bucket { length: parameter.1, parameters: vec![parameter] }),
        }
    }
    for bucket in &mut buckets {
        bucket.length = bucket.length.next_multiple_of(parts);
    }
    buckets
}

impl Bucket {
    /// Returns the number of elements, including padding.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Iterates over the paths of the parameters.
    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|(path, _)| path.as_str())
    }

    /// Iterates over the parameters and their ranges in the bucket.
    pub(super) fn places(&self) -> impl Iterator<Item = (&str, Range<usize>)> {
        let mut start = 0;
        self.parameters.iter().map(move |(path, length)| {
            let place = start..start + length;
            start = place.end;
            (path.as_str(), place)
        })
    }

    /// Iterates over the parameters in `range` of the bucket, with the covered range of each parameter.
    pub(super) fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = (&str, Range<usize>)> {
        self.places().filter_map(move |(path, place)| {
            let (from, to) = (range.start.max(place.start), range.end.min(place.end));
            (from < to).then(|| (path, from - place.start..to - place.start))
        })
    }

    /// Packs `range` of the bucket from `values`, which holds its parameters flat.
    pub(super) fn pack(&self, range: Range<usize>, values: &BTreeMap<String, Tensor<1>>) -> Tensor<1> {
        let pieces = self.pieces(range.clone()).map(|(path, piece)| {
            let value = values[path].clone();
            if piece.len() == value.dims()[0] { value } else { value.narrow(0, piece.start, piece.len()) }
        });
        self.join(range, pieces.collect(), || values[&self.parameters[0].0].device())
    }

    /// Joins `range` of the bucket from its [`pieces`](Self::pieces), with zeros behind the last parameter.
    pub(super) fn join(
        &self,
        range: Range<usize>,
        pieces: Vec<Tensor<1>>,
        device: impl FnOnce() -> Device,
    ) -> Tensor<1> {
        let end = self.parameters.iter().map(|(_, length)| length).sum::<usize>();
        padded(pieces, range.end.saturating_sub(end.max(range.start)), device)
    }

    /// Splits `part`, which is `range` of the bucket, into flat pieces of its parameters.
    pub(super) fn unpack(&self, range: Range<usize>, part: &Tensor<1>) -> BTreeMap<String, Tensor<1>> {
        let mut start = 0;
        let pieces = self.pieces(range).map(|(path, piece)| {
            let whole = piece.len() == part.dims()[0];
            let value = if whole { part.clone() } else { part.clone().narrow(0, start, piece.len()) };
            start += piece.len();
            (path.to_owned(), value)
        });
        pieces.collect()
    }
}

fn padded(mut pieces: Vec<Tensor<1>>, padding: usize, device: impl FnOnce() -> Device) -> Tensor<1> {
    if padding > 0 {
        pieces.push(Tensor::zeros([padding], &device()));
    }
    if pieces.len() == 1 { pieces.swap_remove(0) } else { Tensor::cat(pieces, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(lengths: &[usize]) -> Vec<(String, usize)> {
        lengths.iter().enumerate().map(|(index, length)| (format!("p{index}"), *length)).collect()
    }

    #[test]
    fn buckets_hold_whole_parameters_and_divide_evenly() {
        let buckets = cut(lengths(&[3, 4, 9, 1, 1]), 5, 4);
        let held: Vec<(Vec<&str>, usize)> =
            buckets.iter().map(|bucket| (bucket.paths().collect(), bucket.len())).collect();
        assert_eq!(held, [(vec!["p0", "p1"], 8), (vec!["p2"], 12), (vec!["p3", "p4"], 4)]);
    }

    #[test]
    fn parts_side_by_side_are_the_whole_and_come_apart_again() {
        let device = Device::flex();
        let all = lengths(&[3, 4, 1]);
        let mut numbers = 1..;
        let mut value =
            |length| Tensor::from_data(numbers.by_ref().take(length).collect::<Vec<i32>>().as_slice(), &device);
        let values: BTreeMap<String, Tensor<1>> =
            all.iter().map(|(path, length)| (path.clone(), value(*length))).collect();
        for parts in 1..=6 {
            let bucket = &cut(all.clone(), 100, parts)[0];
            let part = bucket.len() / parts;
            let packed = (0..parts).map(|rank| bucket.pack(rank * part..(rank + 1) * part, &values)).collect();
            let whole = Tensor::cat(packed, 0);
            let numbers: Vec<f32> = whole.to_data().iter().collect();
            assert_eq!(numbers[..8], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
            assert!(numbers[8..].iter().all(|number| *number == 0.0) && numbers.len() == bucket.len());
            for (path, value) in bucket.unpack(0..bucket.len(), &whole) {
                assert_eq!(value.into_data(), values[&path].to_data(), "{path} of {parts}");
            }
            let mut pieces: BTreeMap<String, Vec<Tensor<1>>> = BTreeMap::new();
            for range in (0..parts).map(|rank| rank * part..(rank + 1) * part) {
                for (path, piece) in bucket.unpack(range.clone(), &whole.clone().narrow(0, range.start, part)) {
                    pieces.entry(path).or_default().push(piece);
                }
            }
            assert_eq!(pieces.len(), values.len());
            for (path, pieces) in pieces {
                assert_eq!(Tensor::cat(pieces, 0).into_data(), values[&path].to_data(), "{path} in pieces of {parts}");
            }
        }
    }
}
