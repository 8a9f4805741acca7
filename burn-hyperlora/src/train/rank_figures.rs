//! Figures that each rank measured between two entries of the curves, combined over all ranks.

use hyperlora_core::{Error, Result};
use hyperlora_ranks::Collective;

/// Figures of one rank, as means over its steps.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct RankFigures {
    /// Seconds of a step outside of collectives: this rank's own work, including data waits.
    pub(super) work: f64,
    /// Fraction of a step's time in collectives, including the wait for slower ranks.
    pub(super) communication_share: f64,
    /// Fraction of the time spent waiting for data.
    pub(super) data_wait_share: f64,
    /// Peak memory of the process, in MiB.
    pub(super) peak_mib: f64,
    /// Optimiser moments on this rank, in MiB.
    pub(super) moments_mib: f64,
}

impl RankFigures {
    fn numbers(self) -> [f64; 5] {
        [self.work, self.communication_share, self.data_wait_share, self.peak_mib, self.moments_mib]
    }

    fn to_note(self) -> Vec<u8> {
        self.numbers().into_iter().flat_map(f64::to_le_bytes).collect()
    }

    fn of_note(note: &[u8]) -> Option<Self> {
        let (numbers, rest) = note.as_chunks::<8>();
        let [work, communication_share, data_wait_share, peak_mib, moments_mib] =
            <[[u8; 8]; 5]>::try_from(numbers).ok().filter(|_| rest.is_empty())?.map(f64::from_le_bytes);
        Some(Self { work, communication_share, data_wait_share, peak_mib, moments_mib })
    }
}

/// Exchanges the figures of all ranks and combines them into curves.
///
/// # Errors
/// Errors of the collective; Fault: a rank's message cannot be read.
pub(super) fn share(world: &dyn Collective, own: RankFigures) -> Result<Vec<(String, f64)>> {
    let notes = world.exchange("the figures of all ranks", &own.to_note())?;
    let figures = notes.iter().map(|note| RankFigures::of_note(note)).collect::<Option<Vec<_>>>();
    let figures = figures.ok_or_else(|| Error::Fault("a rank's figures cannot be read".into()))?;
    Ok(curves(&figures).into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

/// Curve of the number of ranks.
pub(super) const COUNT: &str = "ranks/count";

/// Combines `figures`, one entry per rank, into curves.
fn curves(figures: &[RankFigures]) -> Vec<(&'static str, f64)> {
    let count = figures.len().max(1) as f64;
    let mean = |value: fn(&RankFigures) -> f64| figures.iter().map(value).sum::<f64>() / count;
    let most = |value: fn(&RankFigures) -> f64| figures.iter().map(value).fold(0.0, f64::max);
    let mut work: Vec<(f64, usize)> = figures.iter().enumerate().map(|(rank, of)| (of.work, rank)).collect();
    work.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut curves = vec![
        (COUNT, count),
        ("speed/communication_share", mean(|of| of.communication_share)),
        ("speed/data_wait_share", mean(|of| of.data_wait_share)),
        ("ranks/data_wait_share_max", most(|of| of.data_wait_share)),
        ("memory/peak_mib_max", most(|of| of.peak_mib)),
        ("memory/moments_mib_max", most(|of| of.moments_mib)),
    ];
    if let (Some(&(min, _)), Some(&(max, slowest))) = (work.first(), work.last()) {
        curves.extend([
            ("ranks/seconds_of_work_min", min),
            ("ranks/seconds_of_work_median", f64::midpoint(work[(work.len() - 1) / 2].0, work[work.len() / 2].0)),
            ("ranks/seconds_of_work_max", max),
            ("ranks/slowest", slowest as f64),
        ]);
    }
    curves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_rank_is_named_and_shares_are_means() {
        let of = |work, data_wait_share| RankFigures {
            work,
            data_wait_share,
            communication_share: 0.5,
            peak_mib: 9.0,
            moments_mib: work,
        };
        let figures = [of(2.0, 0.0), of(5.0, 0.75), of(3.0, 0.0)];
        let read: Vec<_> = figures.iter().filter_map(|own| RankFigures::of_note(&own.to_note())).collect();
        assert_eq!(read, figures);
        assert_eq!(RankFigures::of_note(&[0; 39]), None);
        let curves = curves(&figures);
        for (name, value) in [
            ("ranks/count", 3.0),
            ("ranks/seconds_of_work_min", 2.0),
            ("ranks/seconds_of_work_median", 3.0),
            ("ranks/seconds_of_work_max", 5.0),
            ("ranks/slowest", 1.0),
            ("speed/data_wait_share", 0.25),
            ("ranks/data_wait_share_max", 0.75),
            ("speed/communication_share", 0.5),
            ("memory/moments_mib_max", 5.0),
        ] {
            assert!(curves.contains(&(name, value)), "{name}: {curves:?}");
        }
    }
}
