//! Bytes of a CPU tensor, in place: what goes to sockets and files without a copy.
//!
//! # Contract
//! A `Tensor` is a handle: shallow clones and views share its memory, and tch lets each of them be
//! sent to another thread and written there. The borrow checker therefore sees the handle given
//! here, not its aliases. While a slice from this module lives, the caller must not
//! - write the same elements through another handle ([`bytes`]), or
//! - read or write them through another handle, or take a second slice of them ([`bytes_mut`]).
//!
//! Whoever hands out parts of one tensor narrows it first: views of disjoint ranges are fine. Code
//! that cannot promise this uses tch's own copies.

use tch::{Device, Tensor};

use crate::Error;

/// The elements of `tensor` as bytes in native order; see the contract above.
///
/// # Errors
/// [`Error::Precondition`] unless it is a dense, contiguous CPU tensor.
pub fn bytes(tensor: &Tensor) -> Result<&[u8], Error> {
    let (ptr, len) = region("bytes", tensor)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: `region` checked that `ptr` begins `len` bytes of one allocation, which `tensor` keeps
    // alive for the slice's lifetime. libtorch allocated it, so the compiler cannot know it to be
    // uninitialised, and every byte is a valid `u8`. Nobody writes it meanwhile: the contract above.
    Ok(unsafe { std::slice::from_raw_parts(ptr, len) })
}

/// As [`bytes`], to be written.
///
/// # Errors
/// [`Error::Precondition`] unless it is a dense, contiguous CPU tensor.
pub fn bytes_mut(tensor: &mut Tensor) -> Result<&mut [u8], Error> {
    let (ptr, len) = region("bytes_mut", tensor)?;
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `bytes`; `&mut` excludes other slices through this handle, and the contract above
    // those through its aliases. Any bit pattern is a value of every element type in use but bool,
    // whose tensors `region` refuses.
    Ok(unsafe { std::slice::from_raw_parts_mut(ptr, len) })
}

/// Where the elements lie, and how many bytes they are.
fn region(op: &'static str, tensor: &Tensor) -> Result<(*mut u8, usize), Error> {
    let refuse = |rule, got: String| Err(Error::Precondition { op, rule, got });
    if !tensor.defined() {
        return refuse("must be defined", "an undefined tensor".to_owned());
    }
    if tensor.device() != Device::Cpu {
        return refuse("must be on the CPU", format!("{:?}", tensor.device()));
    }
    if tensor.is_sparse() || tensor.is_mkldnn() {
        return refuse("must be dense", "a sparse or oneDNN tensor".to_owned());
    }
    if !tensor.is_contiguous() {
        return refuse("must be contiguous", format!("strides {:?} of {:?}", tensor.stride(), tensor.size()));
    }
    if tensor.kind() == tch::Kind::Bool {
        return refuse("must not be boolean", "a boolean tensor".to_owned());
    }
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    Ok((tensor.data_ptr().cast(), len))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn bytes_are_the_elements_in_native_order() {
        let tensor = Tensor::from_slice(&[1.5f32, -2.0]);
        let expected: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| x.to_ne_bytes()).collect();
        assert_eq!(bytes(&tensor).unwrap(), expected);
    }

    #[test]
    fn written_bytes_are_the_tensors_elements() {
        let whole = Tensor::zeros([6], (Kind::BFloat16, Device::Cpu));
        let mut middle = whole.narrow(0, 2, 2);
        bytes_mut(&mut middle).unwrap().copy_from_slice(&[0x80, 0x3f, 0x00, 0x40]);
        let values = Vec::<f32>::try_from(&whole.to_kind(Kind::Float)).unwrap();
        assert_eq!(values, [0.0, 0.0, 1.0, 2.0, 0.0, 0.0]);
    }

    #[test]
    fn what_has_no_plain_bytes_is_refused() {
        let matrix = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        assert!(bytes(&matrix.transpose(0, 1)).unwrap_err().to_string().contains("contiguous"));
        assert!(bytes(&Tensor::new()).unwrap_err().to_string().contains("defined"));
        let flags = Tensor::zeros([2], (Kind::Bool, Device::Cpu));
        assert!(bytes(&flags).unwrap_err().to_string().contains("boolean"));
    }

    #[test]
    fn an_empty_tensor_has_no_bytes() {
        let mut empty = Tensor::zeros([0], (Kind::Float, Device::Cpu));
        assert!(bytes(&empty).unwrap().is_empty());
        assert!(bytes_mut(&mut empty).unwrap().is_empty());
    }
}
