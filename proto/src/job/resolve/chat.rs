//! `data.chat`: how conversations become tokens.

use super::Resolver;
use crate::chat::BUILT_IN;
use crate::job::diagnostic::{Place, did_you_mean, shown};
use crate::job::file::{ChatFile, DataFile, JobFile};
use crate::job::read::{At, Field};
use crate::job::spec::{ChatLoss, ChatSpec, ChatTemplate, ContentKind, DataSpec, DatasetSpec};

/// The template beside the model's tokenizer.
const FROM_MODEL: &str = "from_model";
/// Most control tokens that are added.
const MAX_SPECIAL_TOKENS: usize = 256;

impl Resolver<'_> {
    pub(super) fn chat(&mut self, data: &DataFile) -> Option<ChatSpec> {
        let At { value: chat, place } = data.chat.given()?;
        fn of_code<T>(field: &Field<T>) -> Option<&Place> {
            field.given().map(|at| &at.place)
        }
        for (key, given) in [
            ("packing", of_code(&data.packing)),
            ("fim_rate", of_code(&data.fim_rate)),
            ("fim_spm_rate", of_code(&data.fim_spm_rate)),
            ("fim_level", of_code(&data.fim_level)),
            ("metadata_prefix", of_code(&data.metadata_prefix)),
        ] {
            if let Some(given) = given {
                let message = format!(
                    "data.{key} is for code, and data.chat ({place}) for conversations, which stay whole and have no \
                     holes: leave out one of the two"
                );
                self.sink.report(given, message);
            }
        }
        let template = self.template(chat, place)?;
        let built_in = match &template {
            ChatTemplate::BuiltIn(name) => BUILT_IN.iter().find(|known| known.name == name),
            ChatTemplate::File(_) | ChatTemplate::FromModel => None,
        };
        Some(ChatSpec {
            template,
            loss: chat.loss.or(ChatLoss::Assistant),
            system: chat.system.given().map(|at| {
                if at.value.trim().is_empty() {
                    self.sink.report(&at.place, "data.chat.system is empty: leave it out");
                }
                at.value.clone()
            }),
            special_tokens: self.special_tokens(chat, built_in.map_or(&[], |known| known.special_tokens)),
        })
    }

    fn template(&mut self, chat: &ChatFile, place: &Place) -> Option<ChatTemplate> {
        let at = match &chat.template {
            Field::Given(at) => at,
            Field::Wrong => return None,
            Field::Absent => return self.report(place, "data.chat lacks template: how turns are laid out"),
        };
        let name = at.value.as_str();
        if name == FROM_MODEL {
            return Some(ChatTemplate::FromModel);
        }
        if BUILT_IN.iter().any(|known| known.name == name) {
            return Some(ChatTemplate::BuiltIn(name.to_owned()));
        }
        if name.contains(['/', '.']) {
            return Some(ChatTemplate::File(self.path(at)));
        }
        let names = || BUILT_IN.iter().map(|known| known.name).chain([FROM_MODEL]);
        let advice = did_you_mean(name, names());
        let known = match advice.is_empty() {
            true => format!(
                "; known are {}, or a path such as ./chat.jinja",
                names().collect::<Vec<_>>().join(", ")
            ),
            false => advice,
        };
        self.report(&at.place, format!("data.chat.template: no template is called {}{known}", shown(name)))
    }

    fn special_tokens(&mut self, chat: &ChatFile, built_in: &[&str]) -> Vec<String> {
        let mut tokens: Vec<String> = built_in.iter().map(|token| (*token).to_owned()).collect();
        let Some(At { value: given, place }) = chat.special_tokens.given() else { return tokens };
        if given.len() > MAX_SPECIAL_TOKENS {
            let message =
                format!("data.chat.special_tokens must be at most {MAX_SPECIAL_TOKENS}, got {}", given.len());
            self.sink.report(place, message);
        }
        for At { value: token, place } in given {
            if token.trim() != token || token.is_empty() || token.len() > 100 {
                let rule = "must be a text of 1 to 100 bytes with no space around it";
                self.sink.report(place, format!("data.chat.special_tokens: {} {rule}", shown(token)));
            } else if tokens.contains(token) {
                self.sink
                    .report(place, format!("data.chat.special_tokens: {} is there already", shown(token)));
            } else {
                tokens.push(token.clone());
            }
        }
        tokens
    }

    /// Reports rows and their treatment that do not belong together.
    pub(super) fn check_kind(&mut self, file: &JobFile, dataset: Option<&DatasetSpec>, data: &DataSpec) {
        let Some(DatasetSpec::Collect(collect)) = dataset else { return };
        let section = file.collect.given();
        let place = section.and_then(|section| section.value.kind.given()).map(|kind| &kind.place);
        let place = place.or_else(|| section.map(|section| &section.place)).unwrap_or(&Place::START).clone();
        let chat = file.data.given().and_then(|data| data.value.chat.given());
        match (collect.kind, chat) {
            (ContentKind::Chat, None) if data.chat.is_none() => {
                let message = "collect.kind is chat, but there is no data.chat, which says how conversations become \
                               tokens: give data.chat.template";
                self.sink.report(&place, message);
            }
            (ContentKind::Code, Some(chat)) => {
                let message = format!(
                    "data.chat is for conversations, but collect.kind is code ({place}): write kind: chat, or leave out \
                     data.chat"
                );
                self.sink.report(&chat.place, message);
            }
            _ => {}
        }
    }
}
