//! Paired statistics over photos.

use crate::metrics::GapStatistics;

/// Computes the mean of the differences `right[i] - left[i]` and its t-statistic (the mean in units of its standard
/// error), which is `None` without variance.
pub fn paired_gap(left: &[f64], right: &[f64]) -> GapStatistics {
    let differences: Vec<f64> = left.iter().zip(right).map(|(left, right)| right - left).collect();
    let n = differences.len();
    let mean = mean(&differences);
    let squares: f64 = differences.iter().map(|difference| (difference - mean).powi(2)).sum();
    let standard_error = (squares / (n.saturating_sub(1).max(1) * n.max(1)) as f64).sqrt();
    let t = (standard_error > 0.0).then(|| mean / standard_error);
    GapStatistics { mean, t, n, ..GapStatistics::default() }
}

/// Arithmetic mean; 0 for an empty slice.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_textbook() {
        // numpy: d = [1, 2, 0, 3, 0]; d.mean() / (d.std(ddof=1) / sqrt(5))
        let gap = paired_gap(&[1.0, 2.0, 3.0, 4.0, 5.0], &[2.0, 4.0, 3.0, 7.0, 5.0]);
        assert!((gap.mean - 1.2).abs() < 1e-12);
        assert!(gap.t.is_some_and(|t| (t - 2.057_983_021_710_106).abs() < 1e-9), "{gap:?}");
        assert_eq!(gap.n, 5);
    }

    #[test]
    fn without_spread_there_is_no_t() {
        let single = paired_gap(&[1.0], &[2.0]);
        assert_eq!((single.mean, single.t, single.n), (1.0, None, 1));
        let nothing = paired_gap(&[], &[]);
        assert_eq!((nothing.mean, nothing.t, nothing.n), (0.0, None, 0));
    }
}
