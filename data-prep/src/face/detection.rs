//! Faces that a detector finds, and the suppression of those that it finds twice.

/// Face found in a photo; coordinates in pixels of the photo.
#[derive(Debug, Clone, PartialEq)]
pub struct Detection {
    /// Box x0, y0, x1, y1; may reach beyond the photo.
    pub face_box: [f32; 4],
    /// Left eye, right eye, nose, left and right mouth corner, as the viewer sees them.
    pub points: [[f32; 2]; 5],
    /// Confidence of the detector, in 0..1.
    pub score: f32,
}

impl Detection {
    /// Scales the coordinates: one pixel becomes `sx` pixels wide and `sy` pixels high.
    pub(super) fn scaled(self, [sx, sy]: [f32; 2]) -> Self {
        let [x0, y0, x1, y1] = self.face_box;
        Self {
            face_box: [x0 * sx, y0 * sy, x1 * sx, y1 * sy],
            points: self.points.map(|[x, y]| [x * sx, y * sy]),
            score: self.score,
        }
    }
}

/// Criterion for two boxes that show the same face.
#[derive(Debug, Clone, Copy)]
pub(super) struct SameFace {
    /// They overlap by more than this share of their union.
    pub(super) overlap: f32,
    /// Pixels added to the distance between the two ends of a side: 1 includes the last pixel, 0 does not.
    pub(super) edge: f32,
}

impl SameFace {
    /// Non-maximum suppression: keeps the box with the best score among those of one face. Best first.
    pub(super) fn best_of_each(self, mut candidates: Vec<Detection>) -> Vec<Detection> {
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut kept: Vec<Detection> = Vec::new();
        for candidate in candidates {
            if kept.iter().all(|face| self.overlap(&face.face_box, &candidate.face_box) <= self.overlap) {
                kept.push(candidate);
            }
        }
        kept
    }

    /// Returns the intersection over union of two boxes.
    fn overlap(self, a: &[f32; 4], b: &[f32; 4]) -> f32 {
        let area = |[x0, y0, x1, y1]: [f32; 4]| (x1 - x0 + self.edge).max(0.0) * (y1 - y0 + self.edge).max(0.0);
        let common = area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])]);
        common / (area(*a) + area(*b) - common).max(f32::MIN_POSITIVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_face_seen_twice_counts_once_and_the_best_score_stays() {
        let seen = |face_box, score| Detection { face_box, points: [[0.0; 2]; 5], score };
        let candidates = vec![
            seen([10.0, 10.0, 30.0, 30.0], 0.8),
            seen([12.0, 10.0, 32.0, 30.0], 0.9),
            seen([40.0, 40.0, 60.0, 60.0], 0.7),
        ];
        let kept = SameFace { overlap: 0.3, edge: 0.0 }.best_of_each(candidates);
        assert_eq!(kept.iter().map(|face| face.score).collect::<Vec<_>>(), [0.9, 0.7]);
    }

    #[test]
    fn overlap_is_the_common_part_of_the_union() {
        let (a, b) = ([0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]);
        let overlap = |edge| SameFace { overlap: 0.3, edge }.overlap(&a, &b);
        assert!((overlap(0.0) - 1.0 / 3.0).abs() < 1e-6);
        assert!((overlap(1.0) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn scaling_back_is_per_axis() {
        let face = Detection { face_box: [1.0, 2.0, 3.0, 4.0], points: [[1.0, 1.0]; 5], score: 0.5 }.scaled([2.0, 3.0]);
        assert_eq!((face.face_box, face.points[4]), ([2.0, 6.0, 6.0, 12.0], [2.0, 3.0]));
    }
}
