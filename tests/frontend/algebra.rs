//! The algebra of symbolic dims, against arithmetic on concrete numbers.

use std::collections::BTreeMap;

use lapidary::dim::{Dim, Sym, Unifier};
use proptest::prelude::*;

const NAMES: [&str; 4] = ["batch", "past", "tokens", "n"];

/// A polynomial of a few terms, none above degree 2.
fn dim() -> impl Strategy<Value = Dim> {
    let symbol = prop::sample::select(&NAMES[..]);
    let term = (-6i64..7, prop::collection::vec(symbol, 0..3));
    prop::collection::vec(term, 0..4).prop_map(|terms| {
        terms.iter().fold(Dim::default(), |sum, (coefficient, symbols)| {
            let product = symbols.iter().fold(Dim::constant(*coefficient), |product, name| {
                &product * &Dim::named(name)
            });
            &sum + &product
        })
    })
}

fn values() -> impl Strategy<Value = BTreeMap<Sym, i64>> {
    prop::collection::vec(1i64..50, NAMES.len()).prop_map(|values| NAMES.iter().map(Sym::new).zip(values).collect())
}

fn eval(dim: &Dim, values: &BTreeMap<Sym, i64>) -> i64 {
    dim.eval(values).expect("every symbol has a value")
}

proptest! {
    #[test]
    fn sums_and_products_are_those_of_the_numbers(a in dim(), b in dim(), v in values()) {
        prop_assert_eq!(eval(&(&a + &b), &v), eval(&a, &v) + eval(&b, &v));
        prop_assert_eq!(eval(&(&a - &b), &v), eval(&a, &v) - eval(&b, &v));
        prop_assert_eq!(eval(&(&a * &b), &v), eval(&a, &v) * eval(&b, &v));
    }

    #[test]
    fn equal_polynomials_are_equal_however_they_are_made(a in dim(), b in dim(), c in dim()) {
        prop_assert_eq!(&(&a + &b) * &c, &(&c * &b) + &(&a * &c));
        prop_assert_eq!(&(&a - &b) + &b, a);
    }

    #[test]
    fn a_quotient_times_the_divisor_is_the_dividend(a in dim(), b in dim()) {
        if let Some(quotient) = a.div_exact(&b) {
            prop_assert_eq!(&quotient * &b, a.clone());
        }
        if b != Dim::default() {
            prop_assert_eq!((&a * &b).div_exact(&b), Some(a));
        }
    }

    #[test]
    fn text_reads_back(a in dim()) {
        prop_assert_eq!(Dim::parse(&a.to_string()), a);
    }

    #[test]
    fn bounds_hold(a in dim(), v in values()) {
        if let Some(low) = a.lower_bound() {
            prop_assert!(low <= eval(&a, &v));
        }
        if let Some(high) = a.upper_bound() {
            prop_assert!(high >= eval(&a, &v));
        }
    }

    #[test]
    fn what_is_unified_resolves_to_one_dim(pairs in prop::collection::vec((dim(), dim()), 1..4)) {
        let mut unifier = Unifier::new();
        let learned: Vec<_> = pairs.iter().filter(|(a, b)| unifier.unify(a, b).is_ok()).collect();
        for (a, b) in learned {
            prop_assert_eq!(unifier.resolve(a), unifier.resolve(b));
        }
        // Solutions are free of solved symbols, so resolving once is enough.
        for solution in unifier.solved().values() {
            prop_assert_eq!(&unifier.resolve(solution), solution);
        }
    }
}
