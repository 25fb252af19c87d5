//! `model` and `tokenizer`: where weights and vocabulary come from.

use super::Resolver;
use crate::job::diagnostic::{Place, shown};
use crate::job::file::{ModelFile, TokenizerFile};
use crate::job::read::{At, Field};
use crate::job::spec::{ModelSpec, TokenizerSpec, vocab_misfit};
use crate::model::ModelConfig;

/// Every byte and each of the 19 special tokens has an entry.
const MIN_VOCAB_SIZE: u32 = 275;
/// More is a slip: the largest models use about a quarter of a million.
const MAX_VOCAB_SIZE: u32 = 1_000_000;

impl Resolver<'_> {
    pub(super) fn model(&mut self, field: &Field<ModelFile>) -> Option<ModelSpec> {
        const NEEDED: &str = "model.path (a Hugging Face model directory), model.hub (OWNER/NAME on the Hugging \
                              Face hub) or model.init.preset (random weights)";
        let At { value: ModelFile(model), place } = match field {
            Field::Given(model) => model,
            Field::Wrong => return None,
            Field::Absent => return self.report(&Place::START, format!("lacks the model: give {NEEDED}")),
        };
        let ways = [
            model.path.given().map(|at| ("model.path", &at.place)),
            model.hub.given().map(|at| ("model.hub", &at.place)),
            model.init.given().map(|at| ("model.init", &at.place)),
        ];
        let mut given = ways.into_iter().flatten();
        if let (Some((first, first_place)), Some((second, place))) = (given.next(), given.next()) {
            return self.report(
                place,
                format!("{second} and {first} ({first_place}) contradict each other: keep one"),
            );
        }
        if let (Some(at), None) = (model.revision.given(), model.hub.given()) {
            return self.report(&at.place, "model.revision is for model.hub");
        }
        match (&model.path, &model.hub, &model.init) {
            (Field::Given(path), ..) => Some(ModelSpec::Existing(self.path(path))),
            (_, Field::Given(hub), _) => self.hub_model(hub, &model.revision),
            (.., Field::Given(At { value: init, place })) => match &init.preset {
                Field::Given(preset) => {
                    Some(ModelSpec::Init { preset: preset.value.0.to_owned(), seed: init.seed.or(0) })
                }
                Field::Absent => self.report(place, "model.init lacks preset"),
                Field::Wrong => None,
            },
            (Field::Absent, Field::Absent, Field::Absent) => {
                self.report(place, format!("lacks the model: give {NEEDED}"))
            }
            _ => None,
        }
    }

    fn hub_model(&mut self, hub: &At<String>, revision: &Field<String>) -> Option<ModelSpec> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let is_part = |part: &str| {
            !part.is_empty() && part.len() <= 96 && !part.starts_with('.') && part.chars().all(is_plain)
        };
        if !hub.value.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name)) {
            let advice = "is no model of the hub: OWNER/NAME; a directory is given as model.path";
            return self.report(&hub.place, format!("model.hub: {} {advice}", shown(&hub.value)));
        }
        Some(ModelSpec::Hub {
            repo: hub.value.clone(),
            revision: revision.given().map(|at| at.value.clone()),
        })
    }

    pub(super) fn tokenizer(
        &mut self,
        field: &Field<TokenizerFile>,
        model: Option<&ModelSpec>,
        shape: Option<&ModelConfig>,
    ) -> Option<TokenizerSpec> {
        let preset_vocab = shape.and_then(|shape| u32::try_from(shape.vocab_size).ok());
        let file = match field {
            Field::Wrong => return None,
            Field::Absent => TokenizerFile::default(),
            Field::Given(at) => at.value.clone(),
        };
        let from_model = file.from_model.given().filter(|at| at.value);
        let ways = [
            file.train.given().map(|at| ("tokenizer.train", &at.place)),
            file.path.given().map(|at| ("tokenizer.path", &at.place)),
            from_model.map(|at| ("tokenizer.from_model", &at.place)),
        ];
        let mut given = ways.into_iter().flatten();
        if let (Some((first, first_place)), Some((second, place))) = (given.next(), given.next()) {
            return self.report(
                place,
                format!("{second} and {first} ({first_place}) contradict each other: keep one"),
            );
        }
        if let Some(path) = file.path.given() {
            return Some(TokenizerSpec::Existing(self.path(path)));
        }
        if let (Some(at), Some(ModelSpec::Init { .. })) = (from_model, model) {
            let rule = "contradicts model.init: random weights come with no tokenizer; give tokenizer.train";
            return self.report(&at.place, format!("tokenizer.from_model {rule}"));
        }
        if let (None, Some(ModelSpec::Existing(_) | ModelSpec::Hub { .. }) | None) =
            (file.train.given(), model)
        {
            return Some(TokenizerSpec::FromModel);
        }
        let train = file.train.or(Default::default());
        let default = preset_vocab.unwrap_or(49_152);
        let range = MIN_VOCAB_SIZE..=MAX_VOCAB_SIZE;
        let vocab_size = self.within("tokenizer.train.vocab_size", &train.vocab_size, range, default);
        if let (Some(at), Some(misfit)) =
            (train.vocab_size.given(), shape.and_then(|shape| vocab_misfit(vocab_size, shape)))
        {
            return self.report(&at.place, misfit);
        }
        Some(TokenizerSpec::Train { vocab_size })
    }
}
