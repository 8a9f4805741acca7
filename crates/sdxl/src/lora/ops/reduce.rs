//! Reduces the rank of a LoRA to the closest one, by singular values.

use crate::lora::{LoraModule, LoraSet, Matrix};
use hyperlora_core::{Error, Result};
use nalgebra::DMatrix;

/// Iteration limit of the SVD. A LoRA needs a few per rank, so hitting the limit means that it does not converge.
const SVD_STEPS: usize = 1 << 20;

/// Error of a rank reduction, relative to the Frobenius norm of each module's update.
#[derive(Debug, Clone, PartialEq)]
pub struct Reduction {
    /// Mean error over the modules.
    pub mean: f64,
    /// Largest error of a module.
    pub worst: f64,
    /// Module with the largest error.
    pub worst_module: String,
}

/// Reduces every module to at most `rank`: the closest update of that rank in the Frobenius norm (Eckart and Young).
/// Singular values are split evenly between down and up; modules of that rank or less are unchanged.
///
/// # Errors
/// Input: the rank is 0, or the LoRA's type cannot hold a value; Fault: the decomposition does not converge.
///
/// # Examples
/// ```
/// use hyperlora_sdxl::lora::LoraSet;
/// use hyperlora_sdxl::lora::ops::reduce;
/// # use hyperlora_sdxl::lora::{LoraModule, Matrix};
/// # use hyperlora_sdxl::source::Component;
/// # use safetensors::Dtype;
/// # fn example(rank: usize) -> LoraSet {
/// #     let ones = |shape: [usize; 2]| Matrix {
/// #         dtype: Dtype::F32,
/// #         shape: shape.to_vec(),
/// #         bytes: 1_f32.to_le_bytes().repeat(shape[0] * shape[1]),
/// #     };
/// #     let module = LoraModule { down: ones([rank, 640]), up: ones([640, rank]), alpha: rank as f32 };
/// #     let key = (Component::Unet, "down_blocks.1.attentions.0.proj_in".to_string());
/// #     LoraSet { modules: [(key, module)].into(), ..LoraSet::default() }
/// # }
///
/// # let mut lora = example(8);
/// // `LoraSet::open` reads `lora` from a file.
/// let lost = reduce(&mut lora, 2)?;
/// assert!(lora.modules.values().all(|module| module.rank() == 2));
/// // All rows of this example's matrices are the same, so rank 2 holds them.
/// assert!(lost.worst < 1e-6, "{}: {}", lost.worst_module, lost.worst);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn reduce(lora: &mut LoraSet, rank: usize) -> Result<Reduction> {
    if rank == 0 {
        return Err(Error::input("--rank", "is 0", "give a rank of at least 1"));
    }
    let mut lost = Reduction { mean: 0.0, worst: 0.0, worst_module: String::new() };
    let count = lora.modules.len().max(1) as f64;
    for ((_, name), module) in &mut lora.modules {
        let error = if module.rank() <= rank { 0.0 } else { truncate(module, rank, name)? };
        lost.mean += error / count;
        if error >= lost.worst {
            lost.worst = error;
            lost.worst_module.clone_from(name);
        }
    }
    Ok(lost)
}

/// Truncates one module and returns the relative error.
fn truncate(module: &mut LoraModule, rank: usize, name: &str) -> Result<f64> {
    let wrong = |problem: String| Error::input(name, problem, "write f32");
    let (output, ranks) = (module.up.shape[0], module.rank());
    let input: usize = module.down.shape[1..].iter().product();
    let double = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<f64>>();
    let up =
        DMatrix::from_row_slice(output, ranks, &double(module.up.values().map_err(wrong)?)) * f64::from(module.scale());
    let down = DMatrix::from_row_slice(ranks, input, &double(module.down.values().map_err(wrong)?));

    // up @ down = Qu (Ru Rd^T) Qd^T, so the SVD runs on a matrix that is only rank x rank.
    let (up, down) = (up.qr(), down.transpose().qr());
    let core = (up.r() * down.r().transpose()).try_svd(true, true, f64::EPSILON, SVD_STEPS);
    let fault = || Error::Fault(format!("{name}: the singular values do not converge"));
    let core = core.ok_or_else(fault)?;
    let (Some(left), Some(right)) = (core.u, core.v_t) else { return Err(fault()) };
    let values = core.singular_values; // largest first
    let kept = rank.min(values.len());
    let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
    let (all, lost) = (square(values.as_slice()), square(&values.as_slice()[kept..]));

    let roots = DMatrix::from_diagonal(&values.rows(0, kept).map(f64::sqrt));
    let up = up.q() * left.columns(0, kept) * &roots; // [out, r]
    let down = roots * right.rows(0, kept) * down.q().transpose(); // [r, in]
    let rows = |matrix: &DMatrix<f64>| matrix.transpose().iter().map(|&value| value as f32).collect::<Vec<f32>>();
    let shape = |matrix: &Matrix, axis: usize| {
        let mut shape = matrix.shape.clone();
        shape[axis] = kept;
        shape
    };
    *module = LoraModule {
        down: Matrix::of(&rows(&down), shape(&module.down, 0), module.down.dtype).map_err(wrong)?,
        up: Matrix::of(&rows(&up), shape(&module.up, 1), module.up.dtype).map_err(wrong)?,
        alpha: kept as f32,
    };
    Ok(if all > 0.0 { (lost / all).sqrt() } else { 0.0 })
}
