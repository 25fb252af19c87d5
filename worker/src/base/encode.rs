//! Tensors to bytes of a unit and back, on whatever device the buffer lies.

use tch::{Kind, Tensor};
use tunefleet_kernels::Error;
use tunefleet_kernels::quant::{self, Code4, FourBit, Nested};
use tunefleet_proto::base_plan::{BaseTensor, Encoding, Part, PartDtype, QuantKind, Quantization};

/// A part of a unit's byte buffer, flat, in its own dtype.
pub fn view(buffer: &Tensor, part: &Part) -> Tensor {
    buffer.narrow(0, part.offset as i64, part.bytes() as i64).view_dtype(kind_of(part.dtype))
}

/// Writes `values` (fp32, on the buffer's device, of the tensor's shape) into its parts of `buffer`,
/// quantised where it is to be.
///
/// # Errors
/// Whatever quantising meets.
pub fn encode(
    tensor: &BaseTensor,
    quantization: Quantization,
    values: &Tensor,
    code8: &Tensor,
    buffer: &Tensor,
) -> Result<(), Error> {
    match &tensor.encoding {
        Encoding::Plain(part) => {
            view(buffer, part).copy_(&values.reshape([-1]));
            Ok(())
        }
        Encoding::FourBit { .. } => {
            with_four_bit(tensor, quantization, buffer, code8, |parts| quant::quantize_4bit(values, parts))
        }
        Encoding::Int8 { codes, scales } => {
            quant::quantize_int8_rows(values, &view(buffer, codes), &view(buffer, scales))
        }
    }
}

/// Writes the values of a quantised tensor into `out`, a dense matrix; leaves it alone for another.
///
/// # Errors
/// Whatever dequantising meets.
pub fn dequantize(
    tensor: &BaseTensor,
    quantization: Quantization,
    buffer: &Tensor,
    code8: &Tensor,
    out: &Tensor,
) -> Result<(), Error> {
    match &tensor.encoding {
        Encoding::Plain(_) => Ok(()),
        Encoding::FourBit { .. } => {
            with_four_bit(tensor, quantization, buffer, code8, |parts| quant::dequantize_4bit(parts, out))
        }
        Encoding::Int8 { codes, scales } => {
            quant::dequantize_int8_rows(&view(buffer, codes), &view(buffer, scales), out)
        }
    }
}

/// What `values` (fp32, a matrix) become when they are quantised and dequantised again, rounded to
/// `kind`.
///
/// # Errors
/// Whatever quantising meets.
pub fn round_trip(values: &Tensor, quantization: Quantization, kind: Kind) -> Result<Tensor, Error> {
    let shape = values.size().iter().map(|&n| n as u64).collect();
    let tensor = BaseTensor::alone(shape, quantization);
    let device = values.device();
    let code8 = quant::dynamic_code(true, device)?;
    let bytes = tensor.end();
    let buffer = Tensor::zeros([bytes as i64], (Kind::Uint8, device));
    encode(&tensor, quantization, values, &code8, &buffer)?;
    let out = Tensor::zeros_like(&values.to_kind(kind));
    match tensor.encoding {
        Encoding::Plain(_) => Ok(values.to_kind(kind)),
        _ => dequantize(&tensor, quantization, &buffer, &code8, &out).map(|()| out),
    }
}

/// Hands the parts of a tensor that is held in 4 bits to `body`.
///
/// # Errors
/// A tensor that is held otherwise, and what `body` meets.
pub fn with_four_bit<T>(
    tensor: &BaseTensor,
    quantization: Quantization,
    buffer: &Tensor,
    code8: &Tensor,
    body: impl FnOnce(&FourBit<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let Encoding::FourBit { codes, absmax, nested } = &tensor.encoding else {
        return Err(Error::Precondition {
            op: "4-bit parts",
            rule: "must be held in 4 bits",
            got: tensor.name.clone(),
        });
    };
    let nested = nested.as_ref().map(|(codes, offset)| (view(buffer, codes), view(buffer, offset)));
    let code = if quantization.kind == QuantKind::Fp4 { Code4::Fp4 } else { Code4::Nf4 };
    body(&FourBit {
        code,
        block: quantization.block.into(),
        codes: &view(buffer, codes),
        absmax: &view(buffer, absmax),
        nested: nested.as_ref().map(|(codes, offset)| Nested { codes, code8, offset }),
    })
}

fn kind_of(dtype: PartDtype) -> Kind {
    match dtype {
        PartDtype::U8 => Kind::Uint8,
        PartDtype::I8 => Kind::Int8,
        PartDtype::Bf16 => Kind::BFloat16,
        PartDtype::F32 => Kind::Float,
    }
}
