//! The weight of a linear that is multiplied with and never trained, as it is held: dense, or in 4 or 8 bits.

use tch::{Device, Tensor};
use tunefleet_kernels::{Error, few_rows};
use tunefleet_proto::base_plan::{BaseTensor, Encoding, Quantization};

use crate::base::encode;

/// Rows for which a CPU reads the matrix as it is held; for more, libtorch's products are faster.
const FEW_ROWS: i64 = 32;

/// A matrix `[O, I]`.
pub enum Matrix {
    /// In the dtype of products.
    Dense(Tensor),
    /// Parts of a unit's bytes.
    Quantized {
        /// Where they are, and its shape.
        tensor: BaseTensor,
        /// How they are to be read.
        quantization: Quantization,
        /// The unit's bytes.
        unit: Tensor,
        /// The dynamic code of nested scales.
        code8: Tensor,
    },
}

impl Matrix {
    /// `x W^T + bias`, `[.., I]` to `[.., O]`.
    ///
    /// # Panics
    /// Where libtorch fails, as every operation of tch does.
    pub fn times(&self, x: &Tensor, bias_o: Option<&Tensor>) -> Tensor {
        self.try_times(x, bias_o).unwrap_or_else(|error| panic!("{error}"))
    }

    fn try_times(&self, x: &Tensor, bias_o: Option<&Tensor>) -> Result<Tensor, Error> {
        let mut size = x.size();
        let x_ni = x.reshape([-1, size.pop().unwrap_or(1)]);
        let rows = x_ni.size()[0];
        if x.device() == Device::Cpu
            && rows <= FEW_ROWS
            && let Some(y_no) = self.times_few(&x_ni, bias_o)?
        {
            size.push(y_no.size()[1]);
            return Ok(y_no.view(size.as_slice()));
        }
        match self {
            Matrix::Dense(weight_oi) => Ok(x.linear(weight_oi, bias_o)),
            Matrix::Quantized { tensor, quantization, unit, code8 } => {
                let shape: Vec<i64> = tensor.shape.iter().map(|&n| n as i64).collect();
                let weight_oi = Tensor::empty(shape.as_slice(), (x.kind(), x.device()));
                encode::dequantize(tensor, *quantization, unit, code8, &weight_oi)?;
                Ok(x.linear(&weight_oi, bias_o))
            }
        }
    }

    fn times_few(&self, x_ni: &Tensor, bias_o: Option<&Tensor>) -> Result<Option<Tensor>, Error> {
        let product = |matrix: &few_rows::Matrix<'_>| few_rows::linear(x_ni, matrix, bias_o);
        match self {
            Matrix::Dense(weight_oi) => product(&few_rows::Matrix::Dense(weight_oi)),
            Matrix::Quantized { tensor, quantization, unit, code8 } => match &tensor.encoding {
                Encoding::Int8 { codes, scales } => {
                    let shape: Vec<i64> = tensor.shape.iter().map(|&n| n as i64).collect();
                    let codes = encode::view(unit, codes).view(shape.as_slice());
                    let scales = encode::view(unit, scales);
                    product(&few_rows::Matrix::Int8Rows { codes: &codes, scales: &scales })
                }
                Encoding::FourBit { .. } => {
                    let (outputs, inputs) = (tensor.shape.first(), tensor.shape.get(1));
                    let size = [outputs, inputs].map(|n| n.copied().unwrap_or(1) as i64);
                    encode::with_four_bit(tensor, *quantization, unit, code8, |parts| {
                        product(&few_rows::Matrix::FourBit { parts, size })
                    })
                }
                Encoding::Plain(_) => Ok(None),
            },
        }
    }
}
