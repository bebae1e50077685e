//! One form for expressions that mean the same.

use super::{Atom, AuthzFilter, Expr, regexes};

/// The canonical form: nested conjunctions and disjunctions flattened, constants folded, single children unwrapped,
/// duplicates removed, children sorted, double negation gone, atoms in their simplest spelling.
/// `decode(encode(e))` equals `canonical(e)`.
pub fn canonical(expr: &Expr) -> Expr {
    match expr {
        Expr::Atom(atom) => Expr::Atom(canonical_atom(atom)),
        Expr::Not(inner) => match canonical(inner) {
            Expr::Not(twice) => *twice,
            Expr::And(all) if all.is_empty() => Expr::never(),
            Expr::Or(any) if any.is_empty() => Expr::always(),
            other => Expr::Not(Box::new(other)),
        },
        Expr::And(children) => {
            let mut out = Vec::new();
            for child in children {
                match canonical(child) {
                    Expr::And(inner) => out.extend(inner),
                    Expr::Or(any) if any.is_empty() => return Expr::never(),
                    other => out.push(other),
                }
            }
            finish(out, Expr::And)
        }
        Expr::Or(children) => {
            let mut out = Vec::new();
            for child in children {
                match canonical(child) {
                    Expr::Or(inner) => out.extend(inner),
                    Expr::And(all) if all.is_empty() => return Expr::always(),
                    other => out.push(other),
                }
            }
            finish(out, Expr::Or)
        }
    }
}

fn finish(mut children: Vec<Expr>, wrap: fn(Vec<Expr>) -> Expr) -> Expr {
    children.sort();
    children.dedup();
    if children.len() == 1 {
        children.remove(0)
    } else {
        wrap(children)
    }
}

/// The simplest spelling of an atom.
pub fn canonical_atom(atom: &Atom) -> Atom {
    regexes::fold(atom)
}

/// A filter with its rules in canonical form, sorted by id.
pub fn canonical_filter(filter: &AuthzFilter) -> AuthzFilter {
    let mut out = filter.clone();
    for rule in out.rules.iter_mut().chain(&mut out.shadow) {
        rule.expr = canonical(&rule.expr);
    }
    out.rules.sort();
    out.shadow.sort();
    out
}
