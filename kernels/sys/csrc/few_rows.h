/* Products of a few rows with a matrix that is much larger: x W^T + bias. What they cost is reading the matrix, so
 * it is read once, as it is held, and widened in the first cache. Raw pointers; tensors become them in few_rows.cpp.
 *
 * A result is a sum over columns in one fixed order, whatever the number of rows and threads: a row's results do not
 * depend on the rows beside it. */
#pragma once
#include "quant.h"

enum few_rows_held { FEW_ROWS_F32 = 0, FEW_ROWS_BF16 = 1, FEW_ROWS_INT8 = 2, FEW_ROWS_4BIT = 3 };

struct few_rows_product {
  const void *x; /* [rows, columns] */
  quant_dtype dtype; /* of x, bias and out: fp32 or bf16 */
  int64_t rows, columns, outputs;
  few_rows_held held;
  const void *values;      /* [outputs, columns]: floats, or codes */
  const float *row_scales; /* of 8 bits, [outputs] */
  quant_scales scales;     /* of 4 bits */
  quant_code code;
  int64_t block;
  const void *bias; /* [outputs], or null */
  void *out;        /* [rows, outputs] */
};

/* In bf16 the matrix is widened, or narrowed, to bf16, as bf16 products would have it.
 * False where this CPU has no AVX-512, or for bf16 lacks its instructions, and where 4 bits lie in columns that are no
 * multiple of 32. */
bool few_rows_cpu(const few_rows_product &product);
