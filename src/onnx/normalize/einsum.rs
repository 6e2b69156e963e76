//! `Einsum` of two operands as operators that say the same: an outer product as a broadcast product, one summed letter as a matrix
//! product. Remote code and older versions of transformers write rotary tables this way (`i,j->ij`).

use super::{Failure, Replacement, SourceNode};
use crate::graph::ValueId;
use crate::graph::op::{AttributeSource, Binary, Op};

/// What becomes of an `Einsum`.
pub(super) struct Sum {
    a: Operand,
    b: Operand,
    product: Op,
    /// Of the product's axes.
    turned: Option<Vec<usize>>,
}

/// An operand with its axes in another order, and then axes of one element at these places.
struct Operand {
    perm: Option<Vec<usize>>,
    added: Vec<i64>,
}

/// How an order of letters becomes another, of which the first has some.
fn operand(from: &[char], to: &[char]) -> Operand {
    let kept: Vec<usize> = to
        .iter()
        .filter_map(|letter| from.iter().position(|l| l == letter))
        .collect();
    let added = to.iter().enumerate().filter(|(_, letter)| !from.contains(letter));
    Operand {
        perm: (!kept.is_sorted()).then_some(kept),
        added: added.map(|(axis, _)| axis as i64).collect(),
    }
}

/// The operators of an equation; `None` if it has another form.
fn parse(equation: &str) -> Option<Sum> {
    let text: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    let (inputs, output) = text.split_once("->")?;
    let (a, b) = inputs.split_once(',')?;
    let letters = |part: &str| -> Option<Vec<char>> {
        let letters: Vec<char> = part.chars().collect();
        let distinct = letters
            .iter()
            .enumerate()
            .all(|(i, letter)| !letters[..i].contains(letter));
        (distinct && letters.iter().all(char::is_ascii_alphabetic)).then_some(letters)
    };
    let (a, b, out) = (letters(a)?, letters(b)?, letters(output)?);
    let known = out.iter().all(|letter| a.contains(letter) || b.contains(letter));
    let summed: Vec<char> = a
        .iter()
        .chain(&b)
        .copied()
        .filter(|letter| !out.contains(letter))
        .collect();
    if !known {
        return None;
    }
    match summed[..] {
        [] => Some(Sum {
            a: operand(&a, &out),
            b: operand(&b, &out),
            product: Op::Binary(Binary::Mul),
            turned: None,
        }),
        // In both, so it is there twice.
        [depth, again] if depth == again => {
            let shared = |letter: &&char| a.contains(letter) && b.contains(letter);
            let batch: Vec<char> = out.iter().filter(shared).copied().collect();
            let rows: Vec<char> = out
                .iter()
                .filter(|l| a.contains(l) && !b.contains(l))
                .copied()
                .collect();
            let columns: Vec<char> = out
                .iter()
                .filter(|l| b.contains(l) && !a.contains(l))
                .copied()
                .collect();
            let ([row], [column]) = (&rows[..], &columns[..]) else {
                return None;
            };
            let order = |last: [char; 2]| -> Vec<char> { batch.iter().copied().chain(last).collect() };
            let result = order([*row, *column]);
            let turned: Vec<usize> = out.iter().filter_map(|l| result.iter().position(|r| r == l)).collect();
            Some(Sum {
                a: operand(&a, &order([*row, depth])),
                b: operand(&b, &order([depth, *column])),
                product: Op::MatMul,
                turned: (!turned.is_sorted()).then_some(turned),
            })
        }
        _ => None,
    }
}

impl SourceNode<'_> {
    /// An `Einsum` of a known form.
    pub(super) fn einsum(&self) -> Result<Replacement, Failure> {
        let equation = self.text("equation")?.unwrap_or_default();
        let sum = parse(&equation).filter(|_| self.inputs.len() == 2);
        Ok(match sum {
            Some(sum) => Replacement::Einsum(Box::new(sum)),
            None => Replacement::Unknown(Some(equation)),
        })
    }

    /// Writes what [`einsum`](Self::einsum) gave.
    pub(super) fn emit_einsum(&mut self, sum: Sum, inputs: &[Option<ValueId>], outputs: Vec<Option<ValueId>>) {
        let mut operands = Vec::new();
        for (operand, (input, part)) in [sum.a, sum.b].into_iter().zip(inputs.iter().zip(["a", "b"])) {
            let mut at = *input;
            if let Some(perm) = operand.perm {
                let turned = self.graph.add_value(&format!("{}.{part}.turned", self.name));
                self.emit(Op::Transpose { perm: Some(perm) }, vec![at], vec![Some(turned)]);
                at = Some(turned);
            }
            if !operand.added.is_empty() {
                let axes = self
                    .graph
                    .add_i64(&format!("{}.{part}.axes", self.name), &operand.added);
                let raised = self.graph.add_value(&format!("{}.{part}.raised", self.name));
                self.emit(Op::Unsqueeze, vec![at, Some(axes)], vec![Some(raised)]);
                at = Some(raised);
            }
            operands.push(at);
        }
        match sum.turned {
            Some(perm) => {
                let product = self.graph.add_value(&format!("{}.product", self.name));
                self.emit(sum.product, operands, vec![Some(product)]);
                self.emit(Op::Transpose { perm: Some(perm) }, vec![Some(product)], outputs);
            }
            None => self.emit(sum.product, operands, outputs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations_of_products() {
        let outer = parse("i , j -> i j").unwrap();
        assert_eq!((outer.a.added, outer.b.added), (vec![1], vec![0]));
        assert_eq!(outer.product, Op::Binary(Binary::Mul));
        // Scores of queries and keys.
        let scores = parse("bqhd,bkhd->bhqk").unwrap();
        assert_eq!(scores.product, Op::MatMul);
        assert_eq!(scores.a.perm, Some(vec![0, 2, 1, 3]));
        assert_eq!(scores.b.perm, Some(vec![0, 2, 3, 1]));
        assert_eq!(scores.turned, None);
        let turned = parse("ij,jk->ki").unwrap();
        assert_eq!(
            (turned.a.perm, turned.b.perm, turned.turned),
            (None, None, Some(vec![1, 0]))
        );
        for other in [
            "ij->ji",
            "ii,j->j",
            "ij,jk->i",
            "i...,j->ij",
            "ij,kl->il",
            "i,j",
            "i,j->ik",
        ] {
            assert!(parse(other).is_none(), "{other}");
        }
    }
}
