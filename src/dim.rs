//! Symbolic dimensions: integer polynomials over named symbols, such as `past + tokens` or `2*batch*tokens`.
//!
//! Owns the algebra (add, subtract, multiply, exact division, substitution), the parser for ONNX `dim_param` strings and
//! the [`Unifier`] that learns equalities between symbols. It does not depend on tensors or operators; shape inference and
//! the layer network build on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

/// A named unknown, for example `batch`. Two symbols are the same if and only if their names are.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sym(Arc<str>);

impl Sym {
    /// The symbol of this name.
    pub fn new(name: impl AsRef<str>) -> Self {
        Sym(Arc::from(name.as_ref()))
    }
    /// Independent sequences in one call.
    pub fn batch() -> Self {
        Sym::new("batch")
    }
    /// New tokens in one call: the prompt chunk in prefill, 1 in decode.
    pub fn tokens() -> Self {
        Sym::new("tokens")
    }
    /// Used positions in the cache before this call.
    pub fn past() -> Self {
        Sym::new("past")
    }
    /// Slots of a static cache.
    pub fn capacity() -> Self {
        Sym::new("capacity")
    }
    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Sym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Sym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A product of symbols, sorted, with repetition for powers. The empty product is 1.
type Monomial = Vec<Sym>;

/// An integer polynomial in normal form: no zero coefficients, so structural equality is equality of polynomials.
/// Coefficients saturate: only a file made to do so has dims near 2^63, and it must not end the process.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Dim {
    terms: BTreeMap<Monomial, i64>,
}

impl Dim {
    /// A number.
    pub fn constant(value: i64) -> Self {
        let mut terms = BTreeMap::new();
        if value != 0 {
            terms.insert(Vec::new(), value);
        }
        Dim { terms }
    }

    /// One symbol.
    pub fn sym(sym: Sym) -> Self {
        Dim {
            terms: BTreeMap::from([(vec![sym], 1)]),
        }
    }

    /// One symbol of this name.
    pub fn named(name: impl AsRef<str>) -> Self {
        Dim::sym(Sym::new(name))
    }

    /// The value, if no symbol is left in it.
    pub fn as_const(&self) -> Option<i64> {
        match self.terms.len() {
            0 => Some(0),
            1 => self.terms.get(&Vec::new()).copied(),
            _ => None,
        }
    }

    /// The symbol, if the dim is exactly one symbol.
    pub fn as_sym(&self) -> Option<&Sym> {
        let (monomial, coefficient) = self.terms.first_key_value()?;
        (self.terms.len() == 1 && *coefficient == 1 && monomial.len() == 1).then(|| &monomial[0])
    }

    /// Whether it is the number 1.
    pub fn is_one(&self) -> bool {
        self.as_const() == Some(1)
    }

    /// The symbols in it.
    pub fn symbols(&self) -> BTreeSet<Sym> {
        self.terms.keys().flatten().cloned().collect()
    }

    /// The least value the dim can have, if one is known. Symbols stand for sizes: `batch`, `tokens` and `capacity` are
    /// at least 1, all others at least 0.
    pub fn lower_bound(&self) -> Option<i64> {
        let at_least_one = [Sym::batch(), Sym::tokens(), Sym::capacity()];
        self.terms.iter().try_fold(0i64, |sum, (monomial, coefficient)| {
            let constant = monomial.is_empty();
            let least = i64::from(monomial.iter().all(|sym| at_least_one.contains(sym)));
            (constant || *coefficient >= 0).then(|| sum.saturating_add(coefficient.saturating_mul(least)))
        })
    }

    /// The greatest value the dim can have, if one is known.
    pub fn upper_bound(&self) -> Option<i64> {
        (&Dim::default() - self).lower_bound().map(i64::saturating_neg)
    }

    fn add_term(&mut self, monomial: Monomial, coefficient: i64) {
        use std::collections::btree_map::Entry;
        match self.terms.entry(monomial) {
            Entry::Vacant(slot) => {
                if coefficient != 0 {
                    slot.insert(coefficient);
                }
            }
            Entry::Occupied(mut slot) => {
                *slot.get_mut() = slot.get().saturating_add(coefficient);
                if *slot.get() == 0 {
                    slot.remove();
                }
            }
        }
    }

    /// The greatest term by degree, then by symbols: an order that multiplication keeps, as division needs.
    fn leading(&self) -> Option<(&Monomial, &i64)> {
        self.terms
            .iter()
            .max_by_key(|(monomial, _)| (monomial.len(), *monomial))
    }

    /// The quotient if `divisor` divides the polynomial without a remainder, as when `Reshape` solves for its -1.
    /// Divisors of several terms are tried by repeated leading-term division, which is exact when a quotient exists.
    pub fn div_exact(&self, divisor: &Dim) -> Option<Dim> {
        let (lead, lead_coefficient) = divisor.leading()?;
        let mut rest = self.clone();
        let mut quotient = Dim::default();
        // Each step removes the leading term; the bound only guards against polynomials that no shape has.
        for _ in 0..64 {
            let Some((monomial, coefficient)) = rest.leading() else {
                return Some(quotient);
            };
            if coefficient.checked_rem(*lead_coefficient)? != 0 {
                return None;
            }
            let mut factor = monomial.clone();
            for sym in lead {
                let at = factor.iter().position(|s| s == sym)?;
                factor.remove(at);
            }
            let mut step = Dim::default();
            step.add_term(factor, coefficient / lead_coefficient);
            rest = &rest - &(&step * divisor);
            quotient = &quotient + &step;
        }
        None
    }

    /// Every symbol found in `values` replaced by its dim.
    pub fn substitute(&self, values: &BTreeMap<Sym, Dim>) -> Dim {
        if self.terms.keys().flatten().all(|s| !values.contains_key(s)) {
            return self.clone();
        }
        let mut sum = Dim::default();
        for (monomial, coefficient) in &self.terms {
            let mut product = Dim::constant(*coefficient);
            for sym in monomial {
                product = match values.get(sym) {
                    Some(dim) => &product * dim,
                    None => &product * &Dim::sym(sym.clone()),
                };
            }
            sum = &sum + &product;
        }
        sum
    }

    /// The number, given a number for every symbol; `None` if a symbol is missing or the number does not fit an i64.
    pub fn eval(&self, values: &BTreeMap<Sym, i64>) -> Option<i64> {
        self.terms.iter().try_fold(0i64, |sum, (monomial, coefficient)| {
            let factor = |p: i64, sym| p.checked_mul(*values.get(sym)?);
            sum.checked_add(monomial.iter().try_fold(*coefficient, factor)?)
        })
    }

    /// Reads an ONNX `dim_param`: sums, differences and products of names and integers, as exporters write them
    /// (`"past_sequence_length + sequence_length"`, `"2*s0"`). Anything else becomes one opaque symbol of that name.
    pub fn parse(text: &str) -> Dim {
        parse_sum(text).unwrap_or_else(|| Dim::named(text.trim()))
    }
}

fn parse_sum(text: &str) -> Option<Dim> {
    let mut sum = Dim::default();
    let text = text.trim();
    let (mut sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text),
    };
    if rest.is_empty() {
        return None;
    }
    loop {
        let end = rest.find(['+', '-']).unwrap_or(rest.len());
        let term = parse_product(&rest[..end])?;
        sum = &sum + &(&term * &Dim::constant(sign));
        match rest[end..].chars().next() {
            None => return Some(sum),
            Some(c) => sign = if c == '-' { -1 } else { 1 },
        }
        rest = &rest[end + 1..];
    }
}

fn parse_product(text: &str) -> Option<Dim> {
    text.split('*').try_fold(Dim::constant(1), |product, factor| {
        let factor = factor.trim();
        let dim = if let Ok(value) = factor.parse::<i64>() {
            Dim::constant(value)
        } else {
            let mut chars = factor.chars();
            let head = chars.next()?;
            let plain = (head.is_alphabetic() || head == '_')
                && chars.all(|c| c.is_alphanumeric() || matches!(c, '_' | '.' | ':'));
            if !plain {
                return None;
            }
            Dim::named(factor)
        };
        Some(&product * &dim)
    })
}

impl From<i64> for Dim {
    fn from(value: i64) -> Self {
        Dim::constant(value)
    }
}

impl From<usize> for Dim {
    fn from(value: usize) -> Self {
        Dim::constant(value as i64)
    }
}

impl std::ops::Add for &Dim {
    type Output = Dim;
    fn add(self, other: &Dim) -> Dim {
        let mut sum = self.clone();
        for (monomial, coefficient) in &other.terms {
            sum.add_term(monomial.clone(), *coefficient);
        }
        sum
    }
}

impl std::ops::Sub for &Dim {
    type Output = Dim;
    fn sub(self, other: &Dim) -> Dim {
        let mut difference = self.clone();
        for (monomial, coefficient) in &other.terms {
            difference.add_term(monomial.clone(), coefficient.saturating_neg());
        }
        difference
    }
}

impl std::ops::Mul for &Dim {
    type Output = Dim;
    fn mul(self, other: &Dim) -> Dim {
        let mut product = Dim::default();
        for (left, a) in &self.terms {
            for (right, b) in &other.terms {
                let mut monomial = left.clone();
                monomial.extend(right.iter().cloned());
                monomial.sort();
                product.add_term(monomial, a.saturating_mul(*b));
            }
        }
        product
    }
}

impl Dim {
    /// Writes the dim with its symbols as `symbol` writes them.
    pub(crate) fn write_with(&self, out: &mut impl fmt::Write, symbol: impl Fn(&str) -> String) {
        // Writing to a string cannot fail, and a formatter that fails reports it itself.
        let _ = self.try_write_with(out, symbol);
    }

    fn try_write_with(&self, out: &mut impl fmt::Write, symbol: impl Fn(&str) -> String) -> fmt::Result {
        if self.terms.is_empty() {
            return out.write_str("0");
        }
        // Symbols before the constant: "past + 1" reads better than "1 + past".
        let symbolic = self.terms.iter().filter(|(m, _)| !m.is_empty());
        let constant = self.terms.iter().filter(|(m, _)| m.is_empty());
        for (i, (monomial, coefficient)) in symbolic.chain(constant).enumerate() {
            match (i, *coefficient < 0) {
                (0, false) => {}
                (0, true) => out.write_str("-")?,
                (_, false) => out.write_str(" + ")?,
                (_, true) => out.write_str(" - ")?,
            }
            let magnitude = coefficient.unsigned_abs();
            if monomial.is_empty() {
                write!(out, "{magnitude}")?;
                continue;
            }
            if magnitude != 1 {
                write!(out, "{magnitude}*")?;
            }
            for (j, sym) in monomial.iter().enumerate() {
                out.write_str(if j > 0 { "*" } else { "" })?;
                out.write_str(&symbol(sym.name()))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.try_write_with(f, str::to_string)
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Two dims that cannot be equal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("dimensions {left} and {right} cannot be equal")]
pub struct DimConflict {
    /// What one side says.
    pub left: Dim,
    /// What the other says.
    pub right: Dim,
}

/// Equalities between dims, solved for single symbols as they are learned.
///
/// Exporters name one length many times (`past_sequence_length`, `s3`, `past_key_values_0_dim_2`): every equation that
/// shape inference meets is handed to [`Unifier::unify`], and [`Unifier::resolve`] gives the common form.
#[derive(Clone, Debug, Default)]
pub struct Unifier {
    solved: BTreeMap<Sym, Dim>,
    kept: BTreeSet<Sym>,
}

impl Unifier {
    /// No equations yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Symbols that are solved for only as a last resort, such as those of graph inputs.
    pub fn keep(&mut self, syms: impl IntoIterator<Item = Sym>) {
        self.kept.extend(syms);
    }

    /// The dim with every solved symbol replaced.
    pub fn resolve(&self, dim: &Dim) -> Dim {
        dim.substitute(&self.solved)
    }

    /// The solutions so far, each free of solved symbols.
    pub fn solved(&self) -> &BTreeMap<Sym, Dim> {
        &self.solved
    }

    /// Learns `left == right`. Solves for a symbol that stands alone in the equation, for preference one that is neither
    /// canonical (`batch`, `tokens`, `past`, `capacity`) nor to be kept. An equation that no single symbol solves is a conflict.
    pub fn unify(&mut self, left: &Dim, right: &Dim) -> Result<(), DimConflict> {
        let (left, right) = (self.resolve(left), self.resolve(right));
        let difference = &left - &right;
        let conflict = || DimConflict {
            left: left.clone(),
            right: right.clone(),
        };
        if difference.as_const() == Some(0) {
            return Ok(());
        }
        let canonical = [Sym::batch(), Sym::tokens(), Sym::past(), Sym::capacity()];
        let alone = |sym: &Sym| {
            let coefficient = difference.terms.get(&vec![sym.clone()]).copied();
            let elsewhere = difference.terms.keys().any(|m| m.len() > 1 && m.contains(sym));
            coefficient.filter(|c| c.unsigned_abs() == 1 && !elsewhere)
        };
        // coefficient * sym + rest == 0
        let solve = |sym: &Sym, coefficient: i64| {
            let mut rest = difference.clone();
            rest.terms.remove(&vec![sym.clone()]);
            &rest * &Dim::constant(coefficient.saturating_neg())
        };
        let negative = |dim: &Dim| dim.terms.values().any(|c| *c < 0);
        // A sum reads better than a difference, and its bounds are known: total = past + tokens.
        let rank = |sym: &Sym, dim: &Dim| (canonical.contains(sym), self.kept.contains(sym), negative(dim));
        let (sym, solution) = difference
            .symbols()
            .into_iter()
            .filter_map(|sym| alone(&sym).map(|c| (solve(&sym, c), sym)))
            .map(|(dim, sym)| (sym, dim))
            .min_by_key(|(sym, dim)| rank(sym, dim))
            .ok_or_else(conflict)?;
        if solution.as_const().is_some_and(|value| value < 0) {
            return Err(conflict());
        }
        let step = BTreeMap::from([(sym.clone(), solution.clone())]);
        for dim in self.solved.values_mut() {
            *dim = dim.substitute(&step);
        }
        self.solved.insert(sym, solution);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_exporters_write() {
        assert_eq!(
            Dim::parse("past_sequence_length + sequence_length").to_string(),
            "past_sequence_length + sequence_length"
        );
        assert_eq!(Dim::parse("2*s0 - 1").to_string(), "2*s0 - 1");
        assert_eq!(Dim::parse("-s0 + 3").to_string(), "-s0 + 3");
        assert_eq!(Dim::parse("4").as_const(), Some(4));
        assert_eq!(Dim::parse("floor(s0/2)"), Dim::named("floor(s0/2)"));
    }

    #[test]
    fn divides_without_remainder_or_not_at_all() {
        let (b, t) = (Dim::named("batch"), Dim::named("tokens"));
        let volume = &(&b * &t) * &Dim::constant(64);
        assert_eq!(
            volume.div_exact(&(&t * &Dim::constant(16))),
            Some(&b * &Dim::constant(4))
        );
        assert_eq!(volume.div_exact(&Dim::constant(5)), None);
        assert_eq!(volume.div_exact(&Dim::constant(0)), None);
        // Whatever the order of the names: the leading term is chosen by degree.
        let (more, z) = (&b + &Dim::constant(1), Dim::named("z"));
        assert_eq!((&more * &z).div_exact(&more), Some(z));
        let sum = &Dim::named("past") + &t;
        assert_eq!((&sum * &b).div_exact(&sum), Some(b));
    }

    #[test]
    fn equal_lengths_of_different_tensors_become_one() {
        let mut unifier = Unifier::new();
        unifier
            .unify(&Dim::named("total"), &Dim::parse("past + tokens"))
            .unwrap();
        unifier.unify(&Dim::named("s1"), &Dim::named("past")).unwrap();
        let total = unifier.resolve(&Dim::parse("total - s1"));
        assert_eq!(total, Dim::named("tokens"));
        assert!(unifier.unify(&Dim::parse("past + 1"), &Dim::named("past")).is_err());
        assert!(unifier.unify(&Dim::constant(3), &Dim::constant(4)).is_err());
    }
}
