//! `collect.sources`: repositories, owners of repositories, datasets that others made.

use std::collections::HashMap;

use super::Resolver;
use crate::job::diagnostic::{Place, shown};
use crate::job::file::{OrganizationFile, SourceFile, TableFile};
use crate::job::location;
use crate::job::read::{At, Field};
use crate::job::spec::{
    ContentKind, OrganizationSpec, RepositoryOrder, RepositorySpec, SourceSpec, TableSpec,
};

const MAX_SOURCES: usize = 10_000;
/// Of github.com.
const GITHUB_API: &str = "https://api.github.com";

impl Resolver<'_> {
    pub(super) fn sources(
        &mut self,
        field: &Field<Vec<At<SourceFile>>>,
        section: &Place,
        kind: ContentKind,
    ) -> Option<Vec<SourceSpec>> {
        let At { value: list, place } = match field {
            Field::Given(list) => list,
            Field::Wrong => return None,
            Field::Absent => return self.report(section, "collect lacks sources: a list of repositories"),
        };
        if list.is_empty() || list.len() > MAX_SOURCES {
            let message =
                format!("collect.sources must hold 1 to {MAX_SOURCES} repositories, got {}", list.len());
            return self.report(place, message);
        }
        let mut sources: Vec<SourceSpec> = Vec::with_capacity(list.len());
        let mut seen: HashMap<String, &Place> = HashMap::new();
        for (index, At { value, place }) in list.iter().enumerate() {
            let key = format!("collect.sources[{index}]");
            let (source, name) = match value {
                SourceFile::Repository { location: at, revision } => {
                    let location = match location::resolve(&at.value, self.base(&at.place)) {
                        Ok(location) => location,
                        Err(rule) => {
                            self.sink.report(&at.place, format!("{key}: {rule}"));
                            continue;
                        }
                    };
                    let revision = revision.given().map(|at| at.value.clone());
                    let name = location.clone();
                    (SourceSpec::Repository(RepositorySpec { location, revision }), name)
                }
                SourceFile::Organization(at) => {
                    let Some(github) = self.organization(&key, at) else { continue };
                    let name = github.org.clone();
                    (SourceSpec::Organization { github }, name)
                }
                SourceFile::Table(at) => {
                    let Some(dataset) = self.table(&key, at, kind) else { continue };
                    let name = dataset.from.clone();
                    (SourceSpec::Table { dataset }, name)
                }
            };
            if kind == ContentKind::Chat && !matches!(source, SourceSpec::Table { .. }) {
                let message =
                    format!("{key}: {} holds files, but collect.kind is chat: give a dataset", shown(&name));
                self.sink.report(place, message);
            }
            let identity = serde_json::to_string(&source).unwrap_or_default();
            if let Some(first) = seen.insert(identity, place) {
                self.sink.report(place, format!("{key}: {} was given already ({first})", shown(&name)));
            }
            sources.push(source);
        }
        Some(sources)
    }

    fn organization(&mut self, key: &str, at: &At<OrganizationFile>) -> Option<OrganizationSpec> {
        let OrganizationFile { org, top, sort, forks, archived, exclude, ssh, api } = &at.value;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let org = match org {
            Field::Given(org) => org,
            Field::Wrong => return None,
            Field::Absent => return self.report(&at.place, format!("{key}.github lacks org: its name")),
        };
        if org.value.is_empty() || org.value.starts_with('.') || !org.value.chars().all(is_plain) {
            let rule = "is no name of an organisation: letters, digits, -, _ and .";
            self.sink.report(&org.place, format!("{key}.github.org: {} {rule}", shown(&org.value)));
        }
        let address = match api {
            Field::Given(api) => {
                let address = api.value.trim_end_matches('/').to_owned();
                let rest = address.strip_prefix("https://").or_else(|| address.strip_prefix("http://"));
                let is_usable = rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(['@', '?', '#']));
                if !is_usable {
                    let rule = "must be an address such as https://host/api/v3, without credentials";
                    self.sink.report(&api.place, format!("{key}.github.api {rule}, got {}", shown(&address)));
                }
                address
            }
            _ => GITHUB_API.to_owned(),
        };
        Some(OrganizationSpec {
            org: org.value.clone(),
            top: top.given().map(|_| self.within(&format!("{key}.github.top"), top, 1..=10_000, 1)),
            sort: sort.or(RepositoryOrder::Stars),
            forks: forks.or(false),
            archived: archived.or(false),
            exclude: exclude
                .given()
                .map(|list| list.value.iter().map(|at| at.value.clone()).collect())
                .unwrap_or_default(),
            ssh: ssh.or(false),
            api: address,
        })
    }

    fn table(&mut self, key: &str, at: &At<TableFile>, kind: ContentKind) -> Option<TableSpec> {
        let TableFile { path, hub, revision, subset, split, data_column, held_out } = &at.value;
        let from = match (path, hub) {
            (Field::Given(path), Field::Absent) => self.path(path).display().to_string(),
            (Field::Absent, Field::Given(hub)) => {
                let parts: Vec<&str> = hub.value.split('/').collect();
                let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
                let is_part = |part: &&str| !part.is_empty() && part.chars().all(is_plain);
                if parts.len() > 2 || !parts.iter().all(is_part) {
                    let rule = "is no dataset of the hub: OWNER/NAME";
                    self.sink.report(&hub.place, format!("{key}.dataset.hub: {} {rule}", shown(&hub.value)));
                }
                format!("hub:{}", hub.value)
            }
            (Field::Wrong, _) | (_, Field::Wrong) => return None,
            _ => return self.report(&at.place, format!("{key}.dataset needs path or hub, one of the two")),
        };
        if let (Field::Given(_), Field::Given(revision)) = (path, revision) {
            self.sink.report(&revision.place, format!("{key}.dataset.revision is of use only with hub"));
        }
        for (name, field) in [("subset", subset), ("split", split)] {
            if let Field::Given(At { value, place }) = field
                && (value.is_empty() || value.split('/').any(|part| matches!(part, "" | "." | "..")))
            {
                let rule = "must be a name inside the dataset";
                self.sink.report(place, format!("{key}.dataset.{name} {rule}, got {}", shown(value)));
            }
        }
        let text = |field: &Field<String>| field.given().map(|at| at.value.clone());
        Some(TableSpec {
            from,
            revision: text(revision),
            subset: text(subset),
            split: text(split),
            column: text(data_column).or_else(|| (kind == ContentKind::Code).then(|| "content".to_owned())),
            held_out: held_out.or(false),
        })
    }
}
