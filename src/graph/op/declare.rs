//! The macros of the operator tables. Both expand to plain enums and exhaustive matches.

/// Declares an enum of operators that differ only in name and operands: for each variant ONNX's name, the opsets that
/// define a version of it, and its operand. The closure at the end builds the rest of its `OperatorInfo`.
macro_rules! named {
    (
        $(#[$meta:meta])*
        $name:ident { $( $(#[$doc:meta])* $variant:ident => $op_type:literal, [$($version:literal),*], $operand:expr; )* }
        |$versions:ident, $slot:ident| $info:expr
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[allow(missing_docs, reason = "the variants are ONNX's operators of the same name")]
        pub enum $name {
            $( $(#[$doc])* $variant, )*
        }

        impl $name {
            /// Every variant, in the table's order.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            /// The operator type as ONNX writes it.
            pub fn op_type(self) -> &'static str {
                match self { $( $name::$variant => $op_type, )* }
            }

            /// The variant of this ONNX name.
            pub fn named(op_type: &str) -> Option<Self> {
                match op_type { $( $op_type => Some($name::$variant), )* _ => None }
            }

            pub(super) const fn info(self) -> OperatorInfo {
                match self {
                    $( $name::$variant => {
                        const INFO: OperatorInfo = {
                            const $versions: &[i64] = &[$($version),*];
                            const $slot: Input = $operand;
                            $info
                        };
                        INFO.op_type($op_type)
                    } )*
                }
            }
        }
    };
}

/// Declares [`Op`](super::Op): `plain` variants with their attributes as fields, `records` whose attributes are a
/// separate struct. A field is `name: type = how ONNX writes it`, see `attributes`.
macro_rules! operators {
    (
        plain {
            $( $(#[$doc:meta])* $variant:ident
               $({ $( $(#[$fdoc:meta])* $field:ident : $type:ty = $spec:expr ),* $(,)? })? => $info:expr; )*
        }
        records {
            $( $(#[$rdoc:meta])* $record:ident
               { $( $(#[$rfdoc:meta])* $rfield:ident : $rtype:ty = $rspec:expr ),* $(,)? } => $rinfo:expr; )*
        }
    ) => {
        $(
            #[doc = concat!("Attributes of [`Op::", stringify!($record), "`].")]
            ///
            $(#[$rdoc])*
            #[derive(Clone, PartialEq, Debug)]
            pub struct $record {
                $( $(#[$rfdoc])* pub $rfield: $rtype, )*
            }
        )*

        /// An operator with its attributes; the head of the module describes the normalized form.
        #[derive(Clone, PartialEq, Debug)]
        #[allow(missing_docs, reason = "variants and attributes are ONNX's of the same name")]
        pub enum Op {
            Unary(Unary),
            Binary(Binary),
            /// Inputs: x, axes? (i64 vector).
            Reduce {
                reduction: Reduction,
                keepdims: bool,
                noop_with_empty_axes: bool,
            },
            $( $(#[$doc])* $variant $({ $( $(#[$fdoc])* $field: $type ),* })?, )*
            $( $(#[$rdoc])* $record($record), )*
            /// An unknown operator. Kept so that `inspect` can show the whole graph and every obstacle is reported at
            /// once; the verifier refuses graphs that contain one.
            Unknown {
                domain: String,
                op_type: String,
            },
        }

        impl Op {
            /// The operator's entry in the table.
            pub fn info(&self) -> OperatorInfo {
                match self {
                    Op::Unary(op) => op.info(),
                    Op::Binary(op) => op.info(),
                    Op::Reduce { reduction, .. } => reduction.info(),
                    $( Op::$variant { .. } => { const INFO: OperatorInfo = $info; INFO } )*
                    $( Op::$record(_) => { const INFO: OperatorInfo = $rinfo; INFO } )*
                    Op::Unknown { .. } => info::unknown(),
                }
            }

            /// One operator of every name, with ONNX's default attributes; 0 or f32 without a default. [`Op::Unknown`]
            /// is not included.
            pub fn all() -> Vec<Op> {
                let mut all: Vec<Op> = Vec::new();
                all.extend(Unary::ALL.iter().map(|op| Op::Unary(*op)));
                all.extend(Binary::ALL.iter().map(|op| Op::Binary(*op)));
                all.extend(Reduction::ALL.iter().map(|reduction| Op::Reduce {
                    reduction: *reduction,
                    keepdims: true,
                    noop_with_empty_axes: false,
                }));
                $( all.push(Op::$variant $({ $( $field: $spec.default() ),* })?); )*
                $( all.push(Op::$record($record { $( $rfield: $rspec.default() ),* })); )*
                all
            }

            /// Calls back with the name and value (`None`: omitted) of each attribute, and whether that is ONNX's
            /// default.
            pub(super) fn each_attribute(&self, mut each: impl FnMut(&'static str, Option<Attribute>, bool)) {
                match self {
                    Op::Unary(_) | Op::Binary(_) | Op::Unknown { .. } => {}
                    Op::Reduce { reduction: _, keepdims, noop_with_empty_axes } => {
                        KEEPDIMS.visit(keepdims, &mut each);
                        NOOP.visit(noop_with_empty_axes, &mut each);
                    }
                    $( Op::$variant $({ $( $field ),* })? => { $( $( $spec.visit($field, &mut each); )* )? } )*
                    $( Op::$record($record { $( $rfield ),* }) => { $( $rspec.visit($rfield, &mut each); )* } )*
                }
            }

            pub(super) fn read_declared<S: AttributeSource>(
                domain: &str,
                op_type: &str,
                source: &S,
            ) -> Result<Option<Op>, S::Error> {
                if let (true, Some(reduction)) = (domain.is_empty(), Reduction::named(op_type)) {
                    return Ok(Some(Op::Reduce {
                        reduction,
                        keepdims: KEEPDIMS.read(source)?,
                        noop_with_empty_axes: NOOP.read(source)?,
                    }));
                }
                $( {
                    const INFO: OperatorInfo = $info;
                    if INFO.is_named(domain, op_type) {
                        source.ignore(INFO.ignored);
                        return Ok(Some(Op::$variant $({ $( $field: $spec.read(source)? ),* })?));
                    }
                } )*
                $( {
                    const INFO: OperatorInfo = $rinfo;
                    if INFO.is_named(domain, op_type) {
                        source.ignore(INFO.ignored);
                        return Ok(Some(Op::$record($record { $( $rfield: $rspec.read(source)? ),* })));
                    }
                } )*
                Ok(None)
            }
        }
    };
}

pub(super) use {named, operators};
