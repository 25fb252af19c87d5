//! What a browser loads: one page, one style, and modules of JavaScript, all from this program.

use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! page {
    ($name:literal) => {
        include_str!(concat!("page/", $name))
    };
}

const INDEX: &str = page!("index.html");
/// Name, type, text.
const ASSETS: [(&str, &str, &str); 12] = [
    ("style.css", "text/css; charset=utf-8", page!("style.css")),
    ("main.js", SCRIPT, page!("main.js")),
    ("fleet.js", SCRIPT, page!("fleet.js")),
    ("jobs.js", SCRIPT, page!("jobs.js")),
    ("job.js", SCRIPT, page!("job.js")),
    ("compare.js", SCRIPT, page!("compare.js")),
    ("workers.js", SCRIPT, page!("workers.js")),
    ("panels.js", SCRIPT, page!("panels.js")),
    ("curves.js", SCRIPT, page!("curves.js")),
    ("chart.js", SCRIPT, page!("chart.js")),
    ("table.js", SCRIPT, page!("table.js")),
    ("text.js", SCRIPT, page!("text.js")),
];

/// The page.
pub async fn index() -> Response {
    text("text/html; charset=utf-8", INDEX)
}

/// What the page names.
pub async fn asset(Path(name): Path<String>) -> Response {
    match ASSETS.iter().find(|(known, ..)| *known == name) {
        Some((_, kind, content)) => text(kind, content),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn text(kind: &'static str, content: &'static str) -> Response {
    // A coordinator that was upgraded has another page.
    ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], content).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest page that a person on a slow line waits for.
    const MOST_BYTES: usize = 200_000;

    #[test]
    fn the_page_is_small_names_nothing_from_elsewhere_and_all_that_it_names_is_there() {
        let all = ASSETS.iter().map(|(.., content)| *content).chain([INDEX]);
        assert!(all.clone().map(str::len).sum::<usize>() < MOST_BYTES);
        for content in all {
            for line in content.lines().filter(|line| line.contains("http")) {
                assert!(line.contains("http://www.w3.org/2000/svg") || line.contains("'http"), "{line}");
            }
            let named = content.split("from \"./").skip(1).chain(content.split("/assets/").skip(1));
            for rest in named {
                let name = rest.split('"').next().unwrap();
                assert!(ASSETS.iter().any(|(known, ..)| *known == name), "{name} is not there");
            }
        }
    }
}
