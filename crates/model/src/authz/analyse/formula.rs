//! Boolean formulas over numbered tests: what filters permit, with what is known put in.

use std::rc::Rc;

/// A formula. Conjunctions and disjunctions have at least two members, sorted and unequal; constants stand alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Formula {
    /// Known.
    Const(bool),
    /// A test.
    Var(u32),
    /// Does not hold.
    Not(Rc<Formula>),
    /// All hold.
    And(Rc<[Formula]>),
    /// At least one holds.
    Or(Rc<[Formula]>),
}

impl Formula {
    pub(super) fn not(self) -> Formula {
        match self {
            Formula::Const(known) => Formula::Const(!known),
            Formula::Not(inner) => (*inner).clone(),
            other => Formula::Not(Rc::new(other)),
        }
    }

    pub(super) fn and(parts: impl IntoIterator<Item = Formula>) -> Formula {
        Formula::join(parts, true)
    }

    pub(super) fn or(parts: impl IntoIterator<Item = Formula>) -> Formula {
        Formula::join(parts, false)
    }

    /// A conjunction (`neutral` true) or disjunction.
    fn join(parts: impl IntoIterator<Item = Formula>, neutral: bool) -> Formula {
        let mut out = Vec::new();
        for part in parts {
            match part {
                Formula::Const(known) if known == neutral => {}
                Formula::Const(known) => return Formula::Const(known),
                Formula::And(inner) if neutral => out.extend(inner.iter().cloned()),
                Formula::Or(inner) if !neutral => out.extend(inner.iter().cloned()),
                other => out.push(other),
            }
        }
        out.sort();
        out.dedup();
        // A member beside its negation decides.
        let contradicts = |part: &Formula| match part {
            Formula::Not(inner) => out.binary_search(inner).is_ok(),
            _ => false,
        };
        if out.iter().any(contradicts) {
            return Formula::Const(!neutral);
        }
        match (out.len(), neutral) {
            (0, _) => Formula::Const(neutral),
            (1, _) => out.remove(0),
            (_, true) => Formula::And(out.into()),
            (_, false) => Formula::Or(out.into()),
        }
    }

    /// The formula with some tests known; `known` answers `None` for the others.
    pub(super) fn assign(&self, known: &dyn Fn(u32) -> Option<bool>) -> Formula {
        match self {
            Formula::Const(_) => self.clone(),
            Formula::Var(var) => known(*var).map_or_else(|| self.clone(), Formula::Const),
            Formula::Not(inner) => inner.assign(known).not(),
            Formula::And(parts) => {
                let mut out = Vec::with_capacity(parts.len());
                for part in parts.iter() {
                    match part.assign(known) {
                        Formula::Const(false) => return Formula::Const(false),
                        part => out.push(part),
                    }
                }
                Formula::and(out)
            }
            Formula::Or(parts) => {
                let mut out = Vec::with_capacity(parts.len());
                for part in parts.iter() {
                    match part.assign(known) {
                        Formula::Const(true) => return Formula::Const(true),
                        part => out.push(part),
                    }
                }
                Formula::or(out)
            }
        }
    }

    /// Calls `f` with every test in it; a test may come several times.
    pub(super) fn vars(&self, f: &mut dyn FnMut(u32)) {
        match self {
            Formula::Const(_) => {}
            Formula::Var(var) => f(*var),
            Formula::Not(inner) => inner.vars(f),
            Formula::And(parts) | Formula::Or(parts) => parts.iter().for_each(|p| p.vars(f)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_fold_and_members_are_unique() {
        let (a, b) = (Formula::Var(0), Formula::Var(1));
        assert_eq!(Formula::and([]), Formula::Const(true));
        assert_eq!(Formula::or([]), Formula::Const(false));
        assert_eq!(Formula::and([a.clone(), a.clone()]), a);
        assert_eq!(
            Formula::and([Formula::and([a.clone(), b.clone()]), a.clone()]),
            Formula::and([b.clone(), a.clone()])
        );
        let f = Formula::or([Formula::and([a.clone(), b.clone().not()]), b.clone()]);
        assert_eq!(f.assign(&|v| (v == 1).then_some(true)), Formula::Const(true));
        assert_eq!(f.assign(&|v| (v == 1).then_some(false)), a);
        assert_eq!(
            Formula::and([a.clone(), b.clone(), a.clone().not()]),
            Formula::Const(false)
        );
        assert_eq!(Formula::or([a.clone(), a.clone().not()]), Formula::Const(true));
        assert_eq!(f.not().not(), Formula::or([b.clone(), Formula::and([a, b.not()])]));
    }
}
