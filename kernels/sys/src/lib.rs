//! Declarations of `csrc/capi.h`, and nothing else. The header is the contract.
#![allow(missing_docs, reason = "documented in csrc/capi.h")]
#![allow(non_camel_case_types, reason = "names of the C header")]

use std::ffi::{c_char, c_int, c_void};

// Linked for its libtorch, not for its declarations.
use torch_sys as _;

pub type tf_tensor = *mut c_void;

pub const TF_OK: c_int = 0;
pub const TF_NO_CUDA: c_int = 2;
pub const TF_ATTENTION_OWN: c_int = 100;

#[repr(C)]
pub struct tf_adamw {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub epsilon: f64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct tf_cpu_memory {
    pub allocated: i64,
    pub allocated_peak: i64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct tf_cuda_memory {
    pub allocated: i64,
    pub allocated_peak: i64,
    pub reserved: i64,
    pub reserved_peak: i64,
}

#[repr(C)]
pub struct tf_nested_scales {
    pub codes: tf_tensor,
    pub code8: tf_tensor,
    pub offset: tf_tensor,
}

#[repr(C)]
pub struct tf_cached_run {
    pub k: tf_tensor,
    pub v: tf_tensor,
    pub cached: i64,
    pub first: i64,
    pub tokens: i64,
}

#[repr(C)]
pub struct tf_held_matrix {
    pub held: c_int,
    pub outputs: i64,
    pub values: tf_tensor,
    pub scales: tf_tensor,
    pub nested: tf_nested_scales,
    pub code: c_int,
    pub block: i64,
}

#[repr(C)]
pub struct tf_adamw_8bit_state {
    pub param: tf_tensor,
    pub grad: tf_tensor,
    pub exp_avg: tf_tensor,
    pub exp_avg_scales: tf_tensor,
    pub exp_avg_sq: tf_tensor,
    pub exp_avg_sq_scales: tf_tensor,
    pub signed8: tf_tensor,
    pub unsigned8: tf_tensor,
    pub grad_divisor: tf_tensor,
    pub found_nonfinite: tf_tensor,
}

#[repr(C)]
pub struct tf_store {
    pub context: *mut c_void,
    pub set: unsafe extern "C" fn(*mut c_void, *const c_char, usize, *const u8, usize) -> c_int,
    pub get: unsafe extern "C" fn(*mut c_void, *const c_char, usize, *mut u8, *mut usize) -> c_int,
}

#[repr(C)]
pub struct tf_nccl {
    _private: [u8; 0],
}

#[repr(C)]
pub struct tf_work {
    _private: [u8; 0],
}

unsafe extern "C" {
    pub fn tf_last_error() -> *const c_char;
    pub fn tf_grad(
        outputs: *const tf_tensor,
        grad_outputs: *const tf_tensor,
        outputs_len: usize,
        inputs: *const tf_tensor,
        inputs_len: usize,
        grads: *mut tf_tensor,
    ) -> c_int;
    pub fn tf_fused_adamw(
        params: *const tf_tensor,
        grads: *const tf_tensor,
        exp_avgs: *const tf_tensor,
        exp_avg_sqs: *const tf_tensor,
        len: usize,
        step: tf_tensor,
        grad_divisor: tf_tensor,
        found_nonfinite: tf_tensor,
        options: *const tf_adamw,
    ) -> c_int;
    pub fn tf_quantize_4bit(
        values: tf_tensor,
        code: c_int,
        block: i64,
        codes: tf_tensor,
        absmax: tf_tensor,
    ) -> c_int;
    pub fn tf_serial_mean(values: tf_tensor, out: tf_tensor) -> c_int;
    pub fn tf_dequantize_4bit(
        codes: tf_tensor,
        absmax: tf_tensor,
        nested: *const tf_nested_scales,
        code: c_int,
        block: i64,
        out: tf_tensor,
    ) -> c_int;
    pub fn tf_quantize_8bit(
        values: tf_tensor,
        code8: tf_tensor,
        block: i64,
        is_signed: c_int,
        codes: tf_tensor,
        absmax: tf_tensor,
    ) -> c_int;
    pub fn tf_dequantize_8bit(
        codes: tf_tensor,
        absmax: tf_tensor,
        code8: tf_tensor,
        block: i64,
        out: tf_tensor,
    ) -> c_int;
    pub fn tf_quantize_int8_rows(values: tf_tensor, codes: tf_tensor, scales: tf_tensor) -> c_int;
    pub fn tf_dequantize_int8_rows(codes: tf_tensor, scales: tf_tensor, out: tf_tensor) -> c_int;
    pub fn tf_dynamic_code(is_signed: c_int, table: *mut tf_tensor) -> c_int;
    pub fn tf_adamw_8bit(state: *const tf_adamw_8bit_state, step: i64, options: *const tf_adamw) -> c_int;
    pub fn tf_cached_attention(
        qkv: tf_tensor,
        heads: i64,
        kv_heads: i64,
        runs: *const tf_cached_run,
        len: usize,
        out: *mut tf_tensor,
    ) -> c_int;
    pub fn tf_few_rows(
        x: tf_tensor,
        matrix: *const tf_held_matrix,
        bias: tf_tensor,
        out: *mut tf_tensor,
    ) -> c_int;
    pub fn tf_frozen_linear(x: tf_tensor, weight: tf_tensor, bias: tf_tensor, out: *mut tf_tensor) -> c_int;
    pub fn tf_attention_cpu(
        q_bhtc: tf_tensor,
        k_bksc: tf_tensor,
        v_bksc: tf_tensor,
        causal: c_int,
        out_bhtc: *mut tf_tensor,
    ) -> c_int;
    pub fn tf_attention_backend(
        q_bhtc: tf_tensor,
        k_bksc: tf_tensor,
        v_bksc: tf_tensor,
        dropout: f64,
        backend: *mut c_int,
    ) -> c_int;
    pub fn tf_gelu_cpu(x: tf_tensor, tanh_form: c_int, out: *mut tf_tensor) -> c_int;
    pub fn tf_layer_norm(
        x: tf_tensor,
        weight: tf_tensor,
        bias: tf_tensor,
        epsilon: f64,
        out: *mut tf_tensor,
    ) -> c_int;
    pub fn tf_gated(gate: tf_tensor, up: tf_tensor, out: *mut tf_tensor) -> c_int;
    pub fn tf_rotate(x: tf_tensor, turns: tf_tensor, out: *mut tf_tensor) -> c_int;
    pub fn tf_bias_gelu(x: tf_tensor, bias: tf_tensor, tanh_form: c_int, out: *mut tf_tensor) -> c_int;
    pub fn tf_residual_dropout(
        residual: tf_tensor,
        x: tf_tensor,
        bias: tf_tensor,
        probability: f64,
        seed: i64,
        stream: i64,
        out: *mut tf_tensor,
    ) -> c_int;
    pub fn tf_softmax_cross_entropy_(
        logits_cv: tf_tensor,
        targets_c: tf_tensor,
        ignored: i64,
        losses_c: *mut tf_tensor,
    ) -> c_int;
    pub fn tf_accumulate(into: *const tf_tensor, grads: *const tf_tensor, len: usize, first: c_int) -> c_int;
    pub fn tf_cuda_managed_zeros(len: i64, device: c_int, out: *mut tf_tensor) -> c_int;
    pub fn tf_foreach_norm(tensors: *const tf_tensor, len: usize, norms: *mut tf_tensor) -> c_int;
    pub fn tf_cpu_bf16_matmul_is_native(native: *mut c_int) -> c_int;
    pub fn tf_set_deterministic(on: c_int) -> c_int;
    pub fn tf_keep_freed_memory();
    pub fn tf_count_cpu_memory() -> c_int;
    pub fn tf_cpu_memory(memory: *mut tf_cpu_memory);
    pub fn tf_cpu_reset_peak();
    pub fn tf_data_ptr(tensor: tf_tensor, data: *mut *mut c_void) -> c_int;
    pub fn tf_cuda_memory(device: c_int, memory: *mut tf_cuda_memory) -> c_int;
    pub fn tf_cuda_reset_peak(device: c_int) -> c_int;
    pub fn tf_cuda_uuid(device: c_int, uuid: *mut u8) -> c_int;
    pub fn tf_nccl_join(
        rank: c_int,
        world: c_int,
        device: c_int,
        store: *const tf_store,
        timeout_ms: i64,
        group: *mut *mut tf_nccl,
    ) -> c_int;
    pub fn tf_nccl_all_gather(
        group: *mut tf_nccl,
        output: tf_tensor,
        input: tf_tensor,
        work: *mut *mut tf_work,
    ) -> c_int;
    pub fn tf_nccl_reduce_scatter(
        group: *mut tf_nccl,
        output: tf_tensor,
        input: tf_tensor,
        work: *mut *mut tf_work,
    ) -> c_int;
    pub fn tf_nccl_all_reduce(group: *mut tf_nccl, tensor: tf_tensor, work: *mut *mut tf_work) -> c_int;
    pub fn tf_nccl_wait(work: *mut tf_work) -> c_int;
    pub fn tf_nccl_is_complete(work: *mut tf_work, complete: *mut c_int) -> c_int;
    pub fn tf_work_free(work: *mut tf_work);
    pub fn tf_nccl_abort(group: *mut tf_nccl) -> c_int;
    pub fn tf_nccl_free(group: *mut tf_nccl);
}
