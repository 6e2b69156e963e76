//! docs/reference/operators.md is the table of operators.

use std::fmt::Write;

use lapidary::graph::Op;
use lapidary::graph::op::{Input, Moves, RowWise};

use crate::runner::check_page;

const HEAD: &str = "\
# Operators

What Lapidary reads, as `src/graph/op` declares it. Written by `UPDATE_FILES=1 cargo nextest run --test files`; do not edit.

- *Versions*: the opsets that redefine the operator, up to 24; models of opset 11 to 25 are read. Contrib operators of ONNX
  Runtime (`com.microsoft`) and operators of Lapidary's own (`lapidary`) have one version.
- *Inputs*: their element types; `=` marks those that must be of one type, `?` those that may be left out, `…` one that may be
  repeated.
- *Rows*: whether one token's values are computed from the same token alone (`always`, or `last axis`: if it works along that).
- *Canonical*: whether it may stay in the graph of a package; the passes rewrite the others or refuse the model.

| operator | versions | inputs | family | rows | only moves | canonical |
|---|---|---|---|---|---|---|
";

fn input(input: &Input) -> String {
    let mark = |is: bool, mark: &str| if is { mark.to_string() } else { String::new() };
    format!(
        "{}{}{}",
        input.types.name(),
        mark(input.same, " ="),
        mark(input.optional, " ?")
    )
}

fn page() -> String {
    let mut all = Op::all();
    all.sort_by_key(|op| (op.domain().to_string(), op.op_type().to_string()));
    let mut text = HEAD.to_string();
    for op in all {
        let info = op.info();
        let domain = match op.domain() {
            "" => String::new(),
            domain => format!("{domain}::"),
        };
        let versions: Vec<String> = info.versions.iter().map(i64::to_string).collect();
        let mut inputs: Vec<String> = info.inputs.iter().map(input).collect();
        if info.variadic {
            inputs.push("…".to_string());
        }
        let rows = match info.row_wise {
            RowWise::Always => "always",
            RowWise::OverLastAxis => "last axis",
            RowWise::Never => "",
        };
        let moves = match info.moves {
            Moves::No => "",
            Moves::InOrder => "in order",
            Moves::Elsewhere => "elsewhere",
        };
        let canonical = if info.canonical { "yes" } else { "no" };
        let _ = writeln!(
            text,
            "| {domain}{} | {} | {} | {:?} | {rows} | {moves} | {canonical} |",
            op.op_type(),
            versions.join(", "),
            inputs.join(", "),
            info.family
        );
    }
    text
}

#[test]
fn the_page_is_the_table() {
    check_page("reference/operators.md", &page());
}
