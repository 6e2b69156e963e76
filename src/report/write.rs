//! The report as Markdown: the prose of `text/report.md` around the tables.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use serde::Serialize;

use super::ablations::{Ablation, ablations};
use super::benchmarks::{self, Verdict};
use super::input::{Group, Input};
use super::markdown::{cite, cite_all, tiny};
use super::plots::{Figure, figures};
use super::{footprint, headlines, missing, quality, steps};

/// A figure, and where the report will find its files.
#[derive(Serialize)]
struct Shown {
    caption: String,
    svg: String,
    png: String,
    cites: String,
}

#[derive(Serialize)]
struct ShownGroup {
    title: String,
    machines: String,
    outputs: String,
    decode: String,
    prefill: String,
    end_to_end: String,
    loading: String,
    memory: String,
    figures: Vec<Shown>,
}

#[derive(Serialize)]
struct ShownAblation {
    name: String,
    title: String,
    table: String,
}

/// A table below its title.
#[derive(Serialize)]
struct Headline {
    title: String,
    table: String,
}

/// Lines of one group.
#[derive(Serialize)]
struct Lines {
    title: String,
    lines: Vec<String>,
}

/// What was made of the input.
pub struct Report {
    pub markdown: String,
    pub figures: Vec<Figure>,
    /// What is missing, as the report says it.
    pub missing: Vec<String>,
}

/// Writes the report. `plots` is the folder of the plots as the report is to refer to it.
pub fn report(input: &Input, plots: &str) -> Report {
    let mut drawn = Vec::new();
    let mut groups = Vec::new();
    for group in &input.groups {
        let figures = figures(group);
        groups.push(shown(group, &figures, plots));
        drawn.extend(figures);
    }
    let all: Vec<(&Group, Ablation<'_>)> = input
        .groups
        .iter()
        .flat_map(|group| ablations(group).into_iter().map(move |a| (group, a)))
        .collect();
    let tables = |name: &str| -> String {
        let wanted = all.iter().filter(|(_, a)| a.name == name);
        let tables: Vec<String> = wanted
            .map(|(group, a)| format!("{}: {}.\n\n{}", group.title(), a.title(), a.table(group)))
            .collect();
        match tables.is_empty() {
            true => "No run here has this switch in another position.\n".to_string(),
            false => tables.join("\n"),
        }
    };
    let elsewhere = |a: &Ablation<'_>| ["shapes", "cache", "weights"].contains(&a.name.as_str());
    let shown_ablations: Vec<ShownAblation> = all
        .iter()
        .filter(|(_, a)| !elsewhere(a))
        .map(|(group, a)| ShownAblation {
            name: a.title(),
            title: group.title(),
            table: a.table(group),
        })
        .collect();
    let (mut headlines, mut slower) = (Vec::new(), Vec::new());
    for group in &input.groups {
        let title = group.title();
        let (table, lines) = (headlines::headlines(group), headlines::slower(group));
        if !table.is_empty() {
            headlines.push(Headline {
                title: title.clone(),
                table,
            });
        }
        if !lines.is_empty() {
            slower.push(Lines { title, lines });
        }
    }
    let quality: Vec<Headline> = quality::texts(input)
        .iter()
        .map(|text| Headline {
            title: text.title(),
            table: text.table(input),
        })
        .collect();
    let missing = missing::missing(input);
    let footnotes: Vec<String> = input
        .sources
        .iter()
        .enumerate()
        .filter(|(i, _)| !input.others.iter().any(|o| o.0 == *i))
        .map(|(i, s)| format!("[^{}]: `{}` ({}): {}", i + 1, s.path.display(), s.hash, s.what))
        .collect();
    let others: Vec<String> = input
        .others
        .iter()
        .map(|id| {
            format!(
                "`{}` ({})",
                input.sources[id.0].path.display(),
                input.sources[id.0].hash
            )
        })
        .collect();
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("usual marks"),
    );
    let template = include_str!("text/report.md");
    environment.add_template("report", template).expect("a fixed template");
    let rendered = environment.get_template("report").and_then(|t| {
        t.render(context! {
            headlines => Value::from(Serde(&headlines)),
            slower => Value::from(Serde(&slower)),
            groups => Value::from(Serde(&groups)),
            conversions => input.conversions.iter().map(steps::section).collect::<Vec<_>>(),
            shapes_table => steps::shapes(&input.conversions),
            weights_table => steps::weights(&input.conversions),
            ablation_shapes => tables("shapes"),
            ablation_cache => tables("cache"),
            ablation_weights => tables("weights"),
            ablations_elsewhere => all.iter().any(|(_, a)| elsewhere(a)),
            ablations => Value::from(Serde(&shown_ablations)),
            verdicts => verdicts(input),
            quality => Value::from(Serde(&quality)),
            unstable => missing::unstable(input),
            missing => &missing,
            footnotes,
            others,
        })
    });
    Report {
        markdown: tidy(&rendered.expect("a fixed template")),
        figures: drawn,
        missing,
    }
}

fn shown(group: &Group, figures: &[Figure], plots: &str) -> ShownGroup {
    let file = |f: &Figure, ending: &str| match plots.is_empty() {
        true => format!("{}.{ending}", f.name),
        false => format!("{plots}/{}.{ending}", f.name),
    };
    ShownGroup {
        title: group.title(),
        machines: benchmarks::machines(group),
        outputs: benchmarks::outputs(group),
        decode: benchmarks::decode(group),
        prefill: benchmarks::prefill(group),
        end_to_end: benchmarks::end_to_end(group),
        loading: footprint::loading(group),
        memory: footprint::memory(group),
        figures: figures
            .iter()
            .map(|f| Shown {
                caption: f.caption.clone(),
                svg: file(f, "svg"),
                png: file(f, "png"),
                cites: cite_all(f.sources.iter().copied()),
            })
            .collect(),
    }
}

/// A line for each system that was compared.
fn verdicts(input: &Input) -> Vec<String> {
    let mut lines = Vec::new();
    for group in &input.groups {
        for r in &group.results {
            let Some(found) = Verdict::of(r, group).comparison().cloned() else {
                continue;
            };
            let verdict = if found.equal {
                "agrees with"
            } else {
                "does **not** agree with"
            };
            let with = group
                .reference
                .as_ref()
                .map(|reference| cite(reference.source))
                .unwrap_or_default();
            lines.push(format!(
                "{}: {} {verdict} {} within the limit of its dtype. Of {} rows of logits, {} rank another token first where the \
                 reference was undecided and {} where it was not; root mean square error of a logit: {}.{}{with}",
                group.title(),
                r.of.system.label,
                found.system,
                found.rows,
                found.differing_within_error,
                found.differing_though_clear,
                tiny(found.rms_logit_error),
                cite(r.source),
            ));
        }
    }
    lines
}

/// One empty line where the template leaves several, and one before headings and images where it leaves none.
fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut empty = 1;
    for line in text.lines() {
        if empty == 0 && (line.starts_with('#') || line.starts_with("![")) {
            out.push('\n');
        }
        empty = if line.trim().is_empty() { empty + 1 } else { 0 };
        if empty < 2 {
            out += line.trim_end();
            out.push('\n');
        }
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use crate::terms::TOP1;

    /// Figures come from files: the prose has none, apart from the name of a term.
    #[test]
    fn the_prose_has_no_figures() {
        let text = include_str!("text/report.md").replace(TOP1.name, "");
        let numbers: Vec<&str> = text
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| word.starts_with(|c: char| c.is_ascii_digit()))
            .collect();
        assert_eq!(numbers, [""; 0]);
    }
}
