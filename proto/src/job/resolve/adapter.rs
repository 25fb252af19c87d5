//! `adapter` and `export`: what is trained beside frozen weights, and how it leaves.

use super::{ABOVE_0, BELOW_1, Resolver};
use crate::adapter::{LoraConfig, MAX_RANK, Targets};
use crate::base_plan::{BLOCKS, QuantKind, Quantization};
use crate::job::diagnostic::shown;
use crate::job::file::{AdapterFile, ExportFile};
use crate::job::read::{At, Field};
use crate::job::spec::{AdapterSpec, ExportSpec, MergeBase, ModelSpec, Precision};
use crate::model::ModelConfig;

impl Resolver<'_> {
    pub(super) fn adapter(
        &mut self,
        field: &Field<AdapterFile>,
        model: Option<&ModelSpec>,
        shape: Option<&ModelConfig>,
    ) -> Option<AdapterSpec> {
        let At { value: adapter, place } = field.given()?;
        let rank = self.within("adapter.rank", &adapter.rank, 1..=MAX_RANK, 32);
        let alpha = self.within("adapter.alpha", &adapter.alpha, ABOVE_0..=1e6, 2.0 * rank as f64);
        let kind = adapter.quantize.or(QuantKind::Nf4);
        let block = adapter.quantize_block.or(64);
        if let Some(at) = adapter.quantize_block.given()
            && !BLOCKS.contains(&block)
        {
            let message =
                format!("adapter.quantize_block must be a power of two from 32 to 4096, got {block}");
            self.sink.report(&at.place, message);
        }
        if !matches!(kind, QuantKind::Nf4 | QuantKind::Fp4) {
            let block = adapter.quantize_block.given().map(|at| ("quantize_block", &at.place));
            let double = adapter.double_quantize.given().map(|at| ("double_quantize", &at.place));
            for (key, place) in [block, double].into_iter().flatten() {
                let message =
                    format!("adapter.{key} is for the 4-bit kinds: adapter.quantize is not one of them");
                self.sink.report(place, message);
            }
        }
        let names = adapter.modules_to_save.or(Vec::new()).into_iter().map(|at| at.value).collect();
        let base_model = model.map(ModelSpec::name);
        let lora = LoraConfig {
            rank,
            alpha,
            dropout: self.within("adapter.dropout", &adapter.dropout, 0.0..=BELOW_1, 0.0),
            rslora: adapter.rslora.or(false),
            dora: adapter.dora.or(false),
            targets: adapter.target_modules.or(Targets::all_linear()),
            modules_to_save: names,
            rank_pattern: Default::default(),
            alpha_pattern: Default::default(),
            token_rows: Vec::new(),
            untied_tokens: None,
            base_model,
        };
        if let Some(error) = shape.and_then(|shape| lora.plan(shape).err()) {
            let place = adapter.target_modules.given().map_or(place, |at| &at.place);
            self.sink.report(place, format!("adapter: {error}"));
        }
        let double = adapter.double_quantize.or(matches!(kind, QuantKind::Nf4 | QuantKind::Fp4));
        Some(AdapterSpec { lora, quantization: Quantization { kind, block, double } })
    }

    pub(super) fn export(&mut self, export: &ExportFile, adapter: Option<&AdapterSpec>) -> ExportSpec {
        let merge = export.merge.or(MergeBase::None);
        if let Some(At { value, place }) = export.merge.given() {
            let quantized = adapter.is_some_and(|adapter| adapter.quantization.kind != QuantKind::None);
            let fault = match value {
                MergeBase::None => None,
                _ if adapter.is_none() => Some("there is no adapter to merge: all weights are trained"),
                MergeBase::Dequantized if !quantized => {
                    Some("adapter.quantize is none: write original, the weights are what they were")
                }
                _ => None,
            };
            if let Some(fault) = fault {
                let word = if *value == MergeBase::Original { "original" } else { "dequantized" };
                self.sink.report(place, format!("export.merge is {}, but {fault}", shown(word)));
            }
        }
        ExportSpec { enabled: export.enabled.or(true), dtype: export.dtype.or(Precision::Bf16), merge }
    }
}
