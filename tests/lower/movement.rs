//! Operators that move elements or read shapes, one by one and in chains.

use lapidary::graph::ValueId;
use lapidary::graph::op::Op;
use lapidary::tensor::Tensor;

use crate::case::Case;

#[test]
fn movements() {
    for (from, to) in [
        (&[2, 3, 4][..], &[0, -1][..]),
        (&[2, 3, 4], &[4, 6]),
        (&[6], &[1, 2, 3]),
        (&[2, 3], &[-1]),
    ] {
        let mut case = Case::new();
        let (x, to) = (case.floats(from), case.i64s(to));
        case.node(Op::Reshape { allowzero: false }, &[x, to], 1);
    }
    for perm in [None, Some(vec![1, 0, 2]), Some(vec![0, 2, 1])] {
        for shape in [&[2, 3, 4][..], &[1, 3, 1]] {
            let mut case = Case::new();
            let x = case.floats(shape);
            case.node(Op::Transpose { perm: perm.clone() }, &[x], 1);
        }
    }
    for axis in [0, 1, 3, -1] {
        let mut case = Case::new();
        let x = case.floats(&[2, 3, 4]);
        case.node(Op::Flatten { axis }, &[x], 1);
    }
    let mut case = Case::new();
    let (x, axes) = (case.floats(&[2, 1, 3, 1]), case.i64s(&[-1, 1]));
    case.node(Op::Squeeze, &[x, axes], 1);
    let mut case = Case::new();
    let x = case.floats(&[2, 1, 3, 1]);
    case.node(Op::Squeeze, &[x], 1);
    let mut case = Case::new();
    let (x, axes) = (case.floats(&[2, 3]), case.i64s(&[0, -1]));
    case.node(Op::Unsqueeze, &[x, axes], 1);
    for (from, to) in [(&[3, 1][..], &[2, 3, 4][..]), (&[2, 3], &[1]), (&[1, 4], &[3, 1])] {
        let mut case = Case::new();
        let (x, to) = (case.floats(from), case.i64s(to));
        case.node(Op::Expand, &[x, to], 1);
    }
    let mut case = Case::new();
    let (x, repeats) = (case.floats(&[2, 3]), case.i64s(&[2, 3]));
    case.node(Op::Tile, &[x, repeats], 1);
    let mut case = Case::new();
    let (a, b) = (case.floats(&[2, 3]), case.floats(&[2, 1]));
    case.node(Op::Concat { axis: -1 }, &[a, b], 1);
    let mut case = Case::new();
    let (x, sizes) = (case.floats(&[2, 6]), case.i64s(&[1, 2, 3]));
    case.node(Op::Split { axis: 1 }, &[x, sizes], 3);
}

#[test]
fn slices() {
    for (starts, ends, axes, steps) in [
        (&[1][..], &[3][..], &[1][..], &[1][..]),
        (&[-2, 0], &[i64::MAX, -1], &[2, 0], &[1, 1]),
        (&[0], &[100], &[2], &[2]),
        (&[-1], &[i64::MIN], &[1], &[-1]),
    ] {
        let mut case = Case::new();
        let x = case.floats(&[2, 3, 5]);
        let parameters = [starts, ends, axes, steps].map(|p| case.i64s(p));
        let inputs = [&[x][..], &parameters].concat();
        case.node(Op::Slice, &inputs, 1);
    }
}

#[test]
fn gathers() {
    let mut case = Case::new();
    let (table, ids) = (case.weight(&[6, 4]), case.ints(&[2, 3], &[0, 5, 2, 1, 1, 3]));
    case.node(Op::Gather { axis: 0 }, &[table, ids], 1);
    let mut case = Case::new();
    let (x, last) = (
        case.floats(&[2, 3, 4]),
        case.graph.add_constant("last", Tensor::from_i64(vec![], &[-1])),
    );
    case.node(Op::Gather { axis: 1 }, &[x, last], 1);
    let mut case = Case::new();
    let (x, picks) = (case.floats(&[2, 4]), case.i64s(&[3, -4]));
    case.node(Op::Gather { axis: -1 }, &[x, picks], 1);
}

#[test]
fn shapes_read_as_data() {
    let mut case = Case::new();
    let x = case.floats(&[2, 3, 4]);
    case.node(Op::Shape { start: 1, end: None }, &[x], 1);
    let mut case = Case::new();
    let x = case.floats(&[2, 3]);
    case.node(Op::Size, &[x], 1);
    let mut case = Case::new();
    let to = case.i64s(&[2, 3]);
    let value = Tensor::from_f32(vec![1], &[1.5]);
    case.node(Op::ConstantOfShape { value }, &[to], 1);
    let mut case = Case::new();
    let ends: Vec<ValueId> = [3, 12, 4]
        .iter()
        .map(|v| case.graph.add_constant("end", Tensor::from_i64(vec![], &[*v])))
        .collect();
    case.node(Op::Range, &ends, 1);
}
