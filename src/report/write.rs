//! The report as Markdown: the prose of `text/report.md` around the tables.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use serde::Serialize;

use super::ablations::{Ablation, ablations};
use super::input::{Group, Input};
use super::markdown::cite_all;
use super::matrix::by_machine;
use super::plots::{self, Figure};
use super::{benchmarks, footprint, headlines, missing, peers, quality, serving, steps};

/// A figure, and the path of its files in the report.
#[derive(Serialize)]
struct Shown {
    caption: String,
    svg: String,
    png: String,
    cites: String,
}

/// Tables of one machine.
#[derive(Serialize)]
struct Machine {
    name: String,
    answers: String,
    decode: String,
    decode_of_ours: String,
    prefill: String,
    prefill_of_ours: String,
    end_to_end: String,
    loading: String,
    memory: String,
    conditions: String,
    /// Times by context and by prompt.
    times: Vec<Shown>,
    /// Time and memory by part.
    parts: Vec<Shown>,
}

/// A table below its title.
#[derive(Serialize)]
struct Titled {
    title: String,
    table: String,
}

/// An ablation.
#[derive(Serialize)]
struct ShownAblation {
    name: String,
    title: String,
    outcome: String,
    table: String,
}

/// Lines of one group.
#[derive(Serialize)]
struct Lines {
    title: String,
    lines: Vec<String>,
}

/// The parts of the report.
pub struct Report {
    pub markdown: String,
    pub figures: Vec<Figure>,
    /// The list of missing data.
    pub missing: Vec<String>,
}

/// Writes the report. `plots` is the folder of the plots as written in the report.
pub fn report(input: &Input, plots: &str) -> Report {
    let mut drawn: Vec<Figure> = Vec::new();
    let mut show = |figures: Vec<Figure>| -> Vec<Shown> {
        let file = |f: &Figure, ending: &str| match plots.is_empty() {
            true => format!("{}.{ending}", f.name),
            false => format!("{plots}/{}.{ending}", f.name),
        };
        let shown = |f: &Figure| Shown {
            caption: f.caption.clone(),
            svg: file(f, "svg"),
            png: file(f, "png"),
            cites: cite_all(f.sources.iter().copied()),
        };
        let all = figures.iter().map(shown).collect();
        drawn.extend(figures);
        all
    };
    let leading = headlines::leading(input).into_iter().next();
    let first_plots = show(leading.map(plots::times).unwrap_or_default());
    let is_leading = |g: &Group| leading.is_some_and(|l| l.title() == g.title());
    let of_peers: Vec<Vec<Figure>> = input
        .peers
        .iter()
        .filter(|g| !is_leading(g))
        .map(plots::times)
        .collect();
    let peer_plots = show(of_peers.into_iter().flatten().collect());
    let mut switches = Vec::new();
    let mut machines = Vec::new();
    for groups in by_machine(input) {
        let times = groups
            .iter()
            .filter(|g| !is_leading(g))
            .flat_map(|g| plots::times(g))
            .collect();
        let parts = groups.iter().flat_map(|g| plots::parts(g)).collect();
        switches.extend(groups.iter().filter_map(|g| plots::switches(g)));
        machines.push(Machine {
            name: groups[0].device.clone(),
            answers: benchmarks::answers(&groups),
            decode: benchmarks::decode(&groups),
            decode_of_ours: benchmarks::decode_of_ours(&groups),
            prefill: benchmarks::prefill(&groups),
            prefill_of_ours: benchmarks::prefill_of_ours(&groups),
            end_to_end: benchmarks::end_to_end(&groups),
            loading: footprint::loading(&groups),
            memory: footprint::memory(&groups),
            conditions: benchmarks::conditions(&groups),
            times: show(times),
            parts: show(parts),
        });
    }
    let switch_plots = show(switches);
    let serving_plots = show(plots::serving(input).into_iter().collect());

    let all: Vec<(&Group, Ablation<'_>)> = input
        .groups
        .iter()
        .flat_map(|group| ablations(group).into_iter().map(move |a| (group, a)))
        .collect();
    let tables = |name: &str| -> String {
        let named = all.iter().filter(|(_, a)| a.name == name);
        let tables: Vec<String> = named
            .map(|(group, a)| {
                let (title, outcome) = (a.title(), a.outcome());
                format!("{}: {title}. {outcome}\n\n{}", group.title(), a.table(group))
            })
            .collect();
        match tables.is_empty() {
            true => "No run here has another value of this setting.\n".to_string(),
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
            outcome: a.outcome(),
            table: a.table(group),
        })
        .collect();
    let groups = || input.peers.iter().chain(&input.groups);
    let slower: Vec<Lines> = groups()
        .map(|g| Lines {
            title: g.title(),
            lines: headlines::slower(g),
        })
        .filter(|lines| !lines.lines.is_empty())
        .collect();
    let titled = |(title, table)| Titled { title, table };
    let quality = quality::texts(input);
    let quality: Vec<Titled> = quality
        .iter()
        .map(|text| titled((text.title(), text.table(input))))
        .collect();
    let sessions: Vec<Titled> = peers::sessions(input).into_iter().map(titled).collect();
    let missing = missing::missing(input);
    let (unstable, measured) = missing::unstable(input);
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
        .map(|id| &input.sources[id.0])
        .map(|s| format!("`{}` ({})", s.path.display(), s.hash))
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
    let conversions = &input.conversions[..];
    let rendered = environment.get_template("report").and_then(|t| {
        t.render(context! {
            headlines => headlines::headlines(input),
            verdict => headlines::verdict(input),
            first_plots => Value::from(Serde(&first_plots)),
            slower => Value::from(Serde(&slower)),
            sessions => Value::from(Serde(&sessions)),
            peer_plots => Value::from(Serde(&peer_plots)),
            quantized_title => peers::quantized_title(input),
            quantized_tokens => peers::quantized_tokens(input),
            quantized_prompts => peers::quantized_prompts(input),
            quantized_memory => peers::quantized_memory(input),
            machines => Value::from(Serde(&machines)),
            serving => serving::serving(input),
            serving_titles => serving::titles(input),
            serving_plots => Value::from(Serde(&serving_plots)),
            exports => steps::exports(conversions),
            passes => steps::passes(conversions),
            layers => steps::layers(conversions),
            engines => steps::engines(conversions),
            shapes_table => steps::shapes(conversions),
            weights_table => steps::weights(conversions),
            ablation_shapes => tables("shapes"),
            ablation_cache => tables("cache"),
            ablation_weights => tables("weights"),
            ablations_elsewhere => all.iter().any(|(_, a)| elsewhere(a)),
            ablations => Value::from(Serde(&shown_ablations)),
            switch_plots => Value::from(Serde(&switch_plots)),
            quality => Value::from(Serde(&quality)),
            unstable,
            measured,
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

/// Collapses several empty lines to one, and inserts one before headings and images.
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

    /// Figures come from files: the prose has none, except in the name of a term.
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
