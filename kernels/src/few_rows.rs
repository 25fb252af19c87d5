//! Products of a few rows with a large matrix: the next tokens of a handful of completions. They cost what reading
//! the matrix costs, so it is read as it is held, quantised or not.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels_sys as sys;

use crate::quant::{self, FourBit};
use crate::{Error, ffi};

const OP: &str = "product of a few rows";

/// A matrix `[O, I]`, as it is held.
pub enum Matrix<'a> {
    /// fp32 or bf16.
    Dense(&'a Tensor),
    /// [`quant::quantize_int8_rows`].
    Int8Rows {
        /// int8 `[O, I]`.
        codes: &'a Tensor,
        /// fp32 `[O]`.
        scales: &'a Tensor,
    },
    /// [`quant::quantize_4bit`] of `[O, I]`.
    FourBit {
        /// Codes and scales.
        parts: &'a FourBit<'a>,
        /// O and I.
        size: [i64; 2],
    },
}

impl Matrix<'_> {
    /// O and I.
    fn size(&self) -> Result<[i64; 2], Error> {
        let of = |tensor: &Tensor| match tensor.size()[..] {
            [outputs, inputs] => Ok([outputs, inputs]),
            ref other => refuse("must be a matrix", format!("{other:?}")),
        };
        match self {
            Matrix::Dense(values) => of(values),
            Matrix::Int8Rows { codes, .. } => of(codes),
            Matrix::FourBit { size, .. } => Ok(*size),
        }
    }
}

/// `x W^T + bias`, of `x_ni` in fp32 or bf16 and in its dtype; sums are fp32. A row's results are the same bits whatever
/// rows stand beside it. `None` where another way is needed: a device that is not a CPU with AVX-512, and 4 bits whose
/// rows are no multiple of 32. Not differentiable.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn linear(x_ni: &Tensor, matrix: &Matrix<'_>, bias_o: Option<&Tensor>) -> Result<Option<Tensor>, Error> {
    if x_ni.device() != Device::Cpu {
        return Ok(None);
    }
    let [outputs, inputs] = matrix.size()?;
    if !matches!(x_ni.size()[..], [_, columns] if columns == inputs) {
        return refuse("must have as many columns as the matrix", format!("{:?} for {inputs}", x_ni.size()));
    }
    if !matches!(x_ni.kind(), Kind::Float | Kind::BFloat16) {
        return refuse("must be fp32 or bf16", format!("{:?}", x_ni.kind()));
    }
    if bias_o.is_some_and(|bias| bias.size() != [outputs] || bias.device() != Device::Cpu) {
        return refuse(
            "of biases must be as long as the matrix is high",
            format!("{bias_o:?} for {outputs}"),
        );
    }
    let none = std::ptr::null_mut();
    let nested = |of: Option<&quant::Nested<'_>>| match of {
        None => sys::tf_nested_scales { codes: none, code8: none, offset: none },
        Some(of) => sys::tf_nested_scales {
            codes: ffi::ptr(of.codes),
            code8: ffi::ptr(of.code8),
            offset: ffi::ptr(of.offset),
        },
    };
    let mut held = sys::tf_held_matrix {
        held: 0,
        outputs,
        values: none,
        scales: none,
        nested: nested(None),
        code: 0,
        block: 0,
    };
    match matrix {
        Matrix::Dense(values) => {
            quant::check_kind(OP, values)?;
            check_dense(values)?;
            held.held = i32::from(values.kind() == Kind::BFloat16);
            held.values = ffi::ptr(values);
        }
        Matrix::Int8Rows { codes, scales } => {
            let cpu = Device::Cpu;
            quant::check_part(
                OP,
                "of codes must hold one a value",
                codes,
                outputs * inputs,
                Kind::Int8,
                cpu,
            )?;
            quant::check_part(OP, "of scales must hold one a row", scales, outputs, Kind::Float, cpu)?;
            (held.held, held.values, held.scales) = (2, ffi::ptr(codes), ffi::ptr(scales));
        }
        Matrix::FourBit { parts, .. } => {
            quant::check_4bit(OP, outputs * inputs, Device::Cpu, parts)?;
            (held.held, held.values, held.scales) = (3, ffi::ptr(parts.codes), ffi::ptr(parts.absmax));
            (held.code, held.block) = (quant::code_number(parts.code), parts.block);
            held.nested = nested(parts.nested.as_ref());
        }
    }
    let mut out = none;
    // SAFETY: live CPU tensors borrowed for the call, whose sizes and kinds were checked above; `held` holds nulls only
    // where its kind needs nothing; a place for one pointer.
    let status = unsafe { sys::tf_few_rows(ffi::ptr(x_ni), &held, bias_o.map_or(none, ffi::ptr), &mut out) };
    ffi::check(OP, status)?;
    if out.is_null() {
        return Ok(None);
    }
    // SAFETY: on success the call wrote null, or a tensor made by `new` for us.
    Ok(Some(unsafe { ffi::owned(vec![out]) }.remove(0)))
}

fn check_dense(values: &Tensor) -> Result<(), Error> {
    match values.is_contiguous() && values.device() == Device::Cpu {
        true => Ok(()),
        false => refuse("must be contiguous on a CPU", format!("strides {:?}", values.stride())),
    }
}

fn refuse<T>(rule: &'static str, got: String) -> Result<T, Error> {
    Err(Error::Precondition { op: OP, rule, got })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Code4, Nested};

    const CPU: Device = Device::Cpu;

    fn random(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, CPU)).to_kind(kind)
    }

    /// What the product should be, and how far fp32 may be from it.
    fn check(ours: &Tensor, x: &Tensor, weight: &Tensor, bias: &Tensor, name: &str) {
        let wide = |t: &Tensor| t.to_kind(Kind::Double);
        let exact = wide(x).mm(&wide(weight).tr()) + wide(bias);
        let sizes = wide(x).abs().mm(&wide(weight).abs().tr()) + wide(bias).abs();
        // A few roundings of fp32, and half a unit in the last place of bf16.
        let (sum, last) = (3e-7, if ours.kind() == Kind::BFloat16 { 1.0 / 256.0 } else { 0.0 });
        let allowed = sizes * sum + exact.abs() * last;
        let off = (wide(ours) - exact).abs().gt_tensor(&allowed).sum(Kind::Int64).int64_value(&[]);
        assert_eq!(off, 0, "{name}");
    }

    fn skipped(result: &Option<Tensor>) -> bool {
        if result.is_none() {
            println!("skipped: this CPU has no AVX-512");
        }
        result.is_none()
    }

    #[test]
    fn of_dense_matrices_of_any_shape_it_is_the_product() {
        for (rows, inputs, outputs) in [(1, 1, 1), (1, 768, 2304), (3, 17, 9), (7, 513, 50), (16, 1024, 8)] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let (x, weight) = (random(&[rows, inputs], kind), random(&[outputs, inputs], kind));
                let bias = random(&[outputs], kind);
                let ours = linear(&x, &Matrix::Dense(&weight), Some(&bias)).unwrap();
                if skipped(&ours) {
                    return;
                }
                check(&ours.unwrap(), &x, &weight, &bias, &format!("{rows} {inputs} {outputs} {kind:?}"));
            }
        }
    }

    #[test]
    fn of_quantised_matrices_it_is_the_product_with_what_they_are_dequantised_to() {
        for (rows, inputs, outputs, block) in [(1, 768, 100, 64), (5, 96, 33, 64), (4, 4096, 16, 4096)] {
            let weight = random(&[outputs, inputs], Kind::Float);
            let (x, bias) = (random(&[rows, inputs], Kind::Float), random(&[outputs], Kind::Float));
            let dense = weight.zeros_like();

            let codes = Tensor::zeros([outputs, inputs], (Kind::Int8, CPU));
            let scales = Tensor::zeros([outputs], (Kind::Float, CPU));
            quant::quantize_int8_rows(&weight, &codes, &scales).unwrap();
            quant::dequantize_int8_rows(&codes, &scales, &dense).unwrap();
            let matrix = Matrix::Int8Rows { codes: &codes, scales: &scales };
            let ours = linear(&x, &matrix, Some(&bias)).unwrap();
            if skipped(&ours) {
                return;
            }
            check(&ours.unwrap(), &x, &dense, &bias, "int8");

            let (len, code8) = (outputs * inputs, quant::dynamic_code(true, CPU).unwrap());
            let blocks = quant::blocks(len, block);
            let bytes = |len: i64| Tensor::zeros([len], (Kind::Uint8, CPU));
            let floats = |len: i64| Tensor::zeros([len], (Kind::Float, CPU));
            for (code, double) in [(Code4::Nf4, false), (Code4::Nf4, true), (Code4::Fp4, true)] {
                let codes = bytes((len + 1) / 2);
                let absmax = floats(if double { quant::blocks(blocks, quant::DOUBLE_BLOCK) } else { blocks });
                let (scale_codes, offset) = (bytes(blocks), floats(1));
                let nested = Nested { codes: &scale_codes, code8: &code8, offset: &offset };
                let nested = double.then_some(nested);
                let parts = FourBit { code, block, codes: &codes, absmax: &absmax, nested };
                quant::quantize_4bit(&weight, &parts).unwrap();
                quant::dequantize_4bit(&parts, &dense).unwrap();
                let matrix = Matrix::FourBit { parts: &parts, size: [outputs, inputs] };
                let ours = linear(&x, &matrix, Some(&bias)).unwrap().unwrap();
                check(&ours, &x, &dense, &bias, &format!("{code:?} {double}"));
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others_nor_on_threads() {
        let (x, weight) = (random(&[11, 1000], Kind::Float), random(&[77, 1000], Kind::BFloat16));
        let of = |x: &Tensor| linear(x, &Matrix::Dense(&weight), None).unwrap();
        let threads = tch::get_num_threads();
        tch::set_num_threads(3);
        let Some(all) = of(&x) else { return };
        tch::set_num_threads(1);
        for row in 0..11 {
            assert!(of(&x.narrow(0, row, 1)).unwrap().equal(&all.narrow(0, row, 1)), "row {row}");
        }
        tch::set_num_threads(threads);
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused() {
        let (x, weight) = (random(&[2, 8], Kind::Float), random(&[4, 8], Kind::Float));
        let message = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>| {
            linear(x, &Matrix::Dense(weight), bias).unwrap_err().to_string()
        };
        assert!(message(&random(&[2, 7], Kind::Float), &weight, None).contains("as many columns"));
        assert!(message(&x, &weight, Some(&random(&[5], Kind::Float))).contains("of biases"));
        assert!(message(&x, &random(&[8, 4], Kind::Float).tr(), None).contains("contiguous"));
        assert!(message(&x.to_kind(Kind::Double), &weight, None).contains("fp32 or bf16"));
    }
}
