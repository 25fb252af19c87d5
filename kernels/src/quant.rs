//! Quantised weights, in the formats of bitsandbytes 0.50 and to the same bits: its CPU kernels on the
//! CPU, its CUDA kernels on a GPU. `kernels/sys/csrc/quant.h` describes the formats.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

/// Scales that share one second-level scale.
pub const DOUBLE_BLOCK: i64 = 256;

/// The 16 values of a 4-bit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code4 {
    /// Quantiles of a normal distribution (Dettmers et al. 2023).
    Nf4,
    /// A sign, two bits of exponent, one of fraction.
    Fp4,
}

/// Second level of scales: `code8[codes[b]] * absmax[b / 256] + offset` is the scale of block `b`.
pub struct Nested<'a> {
    /// Bytes, one per block.
    pub codes: &'a Tensor,
    /// [`dynamic_code`], on the same device.
    pub code8: &'a Tensor,
    /// One fp32 value.
    pub offset: &'a Tensor,
}

/// Where the results of [`quantize_4bit`] go, and what [`dequantize_4bit`] reads; flat tensors.
pub struct FourBit<'a> {
    /// Which values.
    pub code: Code4,
    /// Weights that share a scale.
    pub block: i64,
    /// `ceil(len / 2)` bytes, the first weight in the high half.
    pub codes: &'a Tensor,
    /// fp32: one per block, or with `nested` one per [`DOUBLE_BLOCK`] blocks.
    pub absmax: &'a Tensor,
    /// The scales' own codes.
    pub nested: Option<Nested<'a>>,
}

/// Quantises `values` (fp32 or bf16, any shape) into `into`.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn quantize_4bit(values: &Tensor, into: &FourBit<'_>) -> Result<(), Error> {
    const OP: &str = "quantising to 4 bits";
    let values = values.contiguous();
    let len = values.numel() as i64;
    check_4bit(OP, len, values.device(), into)?;
    check_kind(OP, &values)?;
    let blocks = blocks(len, into.block);
    let own_absmax = into.nested.as_ref().map(|_| Tensor::empty([blocks], (Kind::Float, values.device())));
    let absmax = own_absmax.as_ref().unwrap_or(into.absmax);
    // SAFETY: dense tensors of one device, whose lengths and kinds were checked above.
    let status = unsafe {
        sys::tf_quantize_4bit(
            ffi::ptr(&values),
            code_number(into.code),
            into.block,
            ffi::ptr(into.codes),
            ffi::ptr(absmax),
        )
    };
    ffi::check(OP, status)?;
    if let Some(nested) = &into.nested {
        // SAFETY: live fp32 tensors of one device, one of them with one element.
        let status = unsafe { sys::tf_serial_mean(ffi::ptr(absmax), ffi::ptr(nested.offset)) };
        ffi::check(OP, status)?;
        let centred = absmax - nested.offset;
        quantize_8bit(&centred, nested.code8, DOUBLE_BLOCK, nested.codes, into.absmax)?;
    }
    Ok(())
}

/// Writes the values of `from` into `out` (fp32 or bf16, dense): `code * scale` in fp32, rounded once.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn dequantize_4bit(from: &FourBit<'_>, out: &Tensor) -> Result<(), Error> {
    const OP: &str = "dequantising 4 bits";
    check_4bit(OP, out.numel() as i64, out.device(), from)?;
    check_kind(OP, out)?;
    check_dense(OP, out)?;
    let nested = from.nested.as_ref().map(|nested| sys::tf_nested_scales {
        codes: ffi::ptr(nested.codes),
        code8: ffi::ptr(nested.code8),
        offset: ffi::ptr(nested.offset),
    });
    let nested = nested.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: dense tensors of one device, whose lengths and kinds were checked above; `nested` is null
    // or borrowed for the call.
    let status = unsafe {
        sys::tf_dequantize_4bit(
            ffi::ptr(from.codes),
            ffi::ptr(from.absmax),
            nested,
            code_number(from.code),
            from.block,
            ffi::ptr(out),
        )
    };
    ffi::check(OP, status)
}

/// Row-wise 8 bits: `codes` int8 `[out, in]` = round(127 value / largest of the row), `scales` fp32
/// `[out]` = that largest magnitude.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn quantize_int8_rows(values: &Tensor, codes: &Tensor, scales: &Tensor) -> Result<(), Error> {
    const OP: &str = "quantising rows to 8 bits";
    let values = values.contiguous();
    check_kind(OP, &values)?;
    check_rows(OP, &values, codes, scales)?;
    // SAFETY: dense tensors of one device, whose lengths and kinds were checked above.
    let status = unsafe { sys::tf_quantize_int8_rows(ffi::ptr(&values), ffi::ptr(codes), ffi::ptr(scales)) };
    ffi::check(OP, status)
}

/// Writes the values of [`quantize_int8_rows`] into `out` (fp32 or bf16, dense, `[out, in]`).
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn dequantize_int8_rows(codes: &Tensor, scales: &Tensor, out: &Tensor) -> Result<(), Error> {
    const OP: &str = "dequantising rows of 8 bits";
    check_kind(OP, out)?;
    check_dense(OP, out)?;
    check_rows(OP, out, codes, scales)?;
    // SAFETY: dense tensors of one device, whose lengths and kinds were checked above.
    let status = unsafe { sys::tf_dequantize_int8_rows(ffi::ptr(codes), ffi::ptr(scales), ffi::ptr(out)) };
    ffi::check(OP, status)
}

/// Block-wise 8 bits with a [`dynamic_code`]: `codes` as many bytes as fp32 `values`, `absmax` one per
/// `block`; each code as bitsandbytes finds it on this device, on a CPU from a table of 65,536 steps.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn quantize_8bit(
    values: &Tensor,
    code8: &Tensor,
    block: i64,
    codes: &Tensor,
    absmax: &Tensor,
) -> Result<(), Error> {
    quantize_8bit_as(false, values, code8, block, codes, absmax)
}

/// The nearest code of each value, with a block's largest value and its sign as `scales`: as
/// [`crate::optim::adamw_8bit`] encodes its moments. What was dequantised has the same codes again. On the
/// CPU alone.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn quantize_8bit_signed(
    values: &Tensor,
    code8: &Tensor,
    block: i64,
    codes: &Tensor,
    scales: &Tensor,
) -> Result<(), Error> {
    quantize_8bit_as(true, values, code8, block, codes, scales)
}

fn quantize_8bit_as(
    signed: bool,
    values: &Tensor,
    code8: &Tensor,
    block: i64,
    codes: &Tensor,
    absmax: &Tensor,
) -> Result<(), Error> {
    const OP: &str = "quantising to 8 bits";
    check_8bit(OP, values, code8, block, codes, absmax)?;
    // SAFETY: dense tensors of one device, whose lengths and kinds were checked above.
    let status = unsafe {
        sys::tf_quantize_8bit(
            ffi::ptr(values),
            ffi::ptr(code8),
            block,
            signed.into(),
            ffi::ptr(codes),
            ffi::ptr(absmax),
        )
    };
    ffi::check(OP, status)
}

/// The inverse of [`quantize_8bit`], into fp32 `out`.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn dequantize_8bit(
    codes: &Tensor,
    absmax: &Tensor,
    code8: &Tensor,
    block: i64,
    out: &Tensor,
) -> Result<(), Error> {
    const OP: &str = "dequantising 8 bits";
    check_8bit(OP, out, code8, block, codes, absmax)?;
    // SAFETY: dense tensors of one device, whose lengths and kinds were checked above.
    let status = unsafe {
        sys::tf_dequantize_8bit(ffi::ptr(codes), ffi::ptr(absmax), ffi::ptr(code8), block, ffi::ptr(out))
    };
    ffi::check(OP, status)
}

/// The 256 ascending values of the dynamic code (Dettmers et al. 2022): `signed` for scales and first
/// moments, unsigned for second moments.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn dynamic_code(signed: bool, device: Device) -> Result<Tensor, Error> {
    let mut out = std::ptr::null_mut();
    // SAFETY: `out` is a valid place for one pointer.
    let status = unsafe { sys::tf_dynamic_code(signed.into(), &mut out) };
    ffi::check("dynamic code", status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    let table = unsafe { ffi::owned(vec![out]) }.remove(0);
    Ok(table.to_device(device))
}

/// Blocks of `block` in `len` elements, the last one possibly shorter.
pub fn blocks(len: i64, block: i64) -> i64 {
    len.div_euclid(block.max(1)) + i64::from(len.rem_euclid(block.max(1)) > 0)
}

pub(crate) fn code_number(code: Code4) -> i32 {
    match code {
        Code4::Nf4 => 0,
        Code4::Fp4 => 1,
    }
}

fn refuse<T>(op: &'static str, rule: &'static str, got: String) -> Result<T, Error> {
    Err(Error::Precondition { op, rule, got })
}

pub(crate) fn check_kind(op: &'static str, tensor: &Tensor) -> Result<(), Error> {
    match tensor.kind() {
        Kind::Float | Kind::BFloat16 => Ok(()),
        other => refuse(op, "must be fp32 or bf16", format!("{other:?}")),
    }
}

fn check_dense(op: &'static str, tensor: &Tensor) -> Result<(), Error> {
    match tensor.is_contiguous() {
        true => Ok(()),
        false => refuse(op, "must be contiguous", format!("strides {:?}", tensor.stride())),
    }
}

/// `len` dense elements of `kind` on `device`.
pub(crate) fn check_part(
    op: &'static str,
    rule: &'static str,
    tensor: &Tensor,
    len: i64,
    kind: Kind,
    device: Device,
) -> Result<(), Error> {
    let fits = tensor.numel() as i64 == len
        && tensor.kind() == kind
        && tensor.device() == device
        && tensor.is_contiguous();
    if fits {
        return Ok(());
    }
    let got = format!("{} of {:?} on {:?} for {len}", tensor.numel(), tensor.kind(), tensor.device());
    refuse(op, rule, got)
}

pub(crate) fn check_4bit(
    op: &'static str,
    len: i64,
    device: Device,
    parts: &FourBit<'_>,
) -> Result<(), Error> {
    if !(32..=4096).contains(&parts.block) || parts.block & (parts.block - 1) != 0 {
        return refuse(op, "blocks must be a power of two from 32 to 4096", parts.block.to_string());
    }
    let blocks = blocks(len, parts.block);
    check_part(
        op,
        "of codes must hold half a byte a value",
        parts.codes,
        len / 2 + len % 2,
        Kind::Uint8,
        device,
    )?;
    let Some(nested) = &parts.nested else {
        return check_part(op, "of scales must hold one a block", parts.absmax, blocks, Kind::Float, device);
    };
    let outer = self::blocks(blocks, DOUBLE_BLOCK);
    check_part(op, "of scales must hold one for 256 blocks", parts.absmax, outer, Kind::Float, device)?;
    check_part(op, "of scale codes must hold one a block", nested.codes, blocks, Kind::Uint8, device)?;
    check_part(op, "of the dynamic code must hold 256 values", nested.code8, 256, Kind::Float, device)?;
    check_part(op, "of the offset must hold one value", nested.offset, 1, Kind::Float, device)
}

fn check_8bit(
    op: &'static str,
    values: &Tensor,
    code8: &Tensor,
    block: i64,
    codes: &Tensor,
    absmax: &Tensor,
) -> Result<(), Error> {
    let (len, device) = (values.numel() as i64, values.device());
    if block < 1 {
        return refuse(op, "blocks must be at least 1", block.to_string());
    }
    check_part(op, "of values must be dense fp32", values, len, Kind::Float, device)?;
    check_part(op, "of codes must hold one a value", codes, len, Kind::Uint8, device)?;
    check_part(op, "of scales must hold one a block", absmax, blocks(len, block), Kind::Float, device)?;
    check_part(op, "of the dynamic code must hold 256 values", code8, 256, Kind::Float, device)
}

fn check_rows(op: &'static str, values: &Tensor, codes: &Tensor, scales: &Tensor) -> Result<(), Error> {
    let &[rows, columns] = &values.size()[..] else {
        return refuse(op, "must be a matrix", format!("{:?}", values.size()));
    };
    check_part(op, "of codes must hold one a value", codes, rows * columns, Kind::Int8, values.device())?;
    check_part(op, "of scales must hold one a row", scales, rows, Kind::Float, values.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nf4(len: i64, block: i64) -> (Tensor, Tensor) {
        let cpu = Device::Cpu;
        let codes = Tensor::zeros([len / 2 + len % 2], (Kind::Uint8, cpu));
        (codes, Tensor::zeros([blocks(len, block)], (Kind::Float, cpu)))
    }

    #[test]
    fn a_value_is_at_most_half_a_gap_from_its_code_whatever_the_size() {
        for (len, block) in [(1, 64), (63, 64), (64, 64), (1003, 128), (4096, 4096), (70_000, 32)] {
            let values = Tensor::randn([len], (Kind::Float, Device::Cpu));
            let (codes, absmax) = nf4(len, block);
            let parts = FourBit { code: Code4::Nf4, block, codes: &codes, absmax: &absmax, nested: None };
            quantize_4bit(&values, &parts).unwrap();
            let back = values.zeros_like();
            dequantize_4bit(&parts, &back).unwrap();
            // The widest gap of the code is from -1 to -0.696.
            let limit = absmax.max().double_value(&[]) * 0.1520;
            let worst = (&values - &back).abs().max().double_value(&[]);
            assert!(worst <= limit, "{len} in blocks of {block}: {worst} > {limit}");
            // In bf16 it is the same, rounded.
            let rounded = back.to_kind(Kind::BFloat16).zeros_like();
            dequantize_4bit(&parts, &rounded).unwrap();
            assert_eq!(rounded, back.to_kind(Kind::BFloat16));
        }
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused_before_anything_is_written() {
        let values = Tensor::ones([64], (Kind::Float, Device::Cpu));
        let (codes, absmax) = nf4(64, 64);
        let parts = |block| FourBit { code: Code4::Nf4, block, codes: &codes, absmax: &absmax, nested: None };
        assert!(quantize_4bit(&values, &parts(48)).unwrap_err().to_string().contains("power of two"));
        assert!(quantize_4bit(&values, &parts(32)).unwrap_err().to_string().contains("one a block"));
        let double = values.to_kind(Kind::Double);
        assert!(quantize_4bit(&double, &parts(64)).unwrap_err().to_string().contains("fp32 or bf16"));
        let longer = Tensor::ones([70], (Kind::Float, Device::Cpu));
        assert!(dequantize_4bit(&parts(64), &longer).unwrap_err().to_string().contains("half a byte"));
    }
}
