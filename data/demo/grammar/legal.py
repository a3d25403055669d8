"""Law: what each act governs, which court hears it, what breaking it costs, when to file, who enforces it."""

from grammar.world import Domain, Relation, names, words

GOVERNS = Relation(
    name="governs",
    objects=words(
        "salvage tenancy insolvency patents guardianship easements pilotage trademarks probate arbitration usury "
        "bankruptcy quarrying lotteries tolls copyright"
    ),
    closing=(
        "The {subject} Act governs {object}.",
        "Under the {subject} Act a licence is required for {object}.",
        "Parliament passed the {subject} Act to regulate {object}.",
        "The {subject} Act applies to every dispute over {object}.",
    ),
    turned=(
        "In matters of {object} the {subject} Act prevails.",
        "The law of {object} is codified in the {subject} Act.",
    ),
)

COURT = Relation(
    name="court",
    objects=tuple(
        f"{seat} Court"
        for seat in words(
            "Admiralty Chancery Borough Circuit Crown Assize Palatine County Sessions Consistory Forest Stannary "
            "Magistrates Appellate Supreme Juvenile"
        )
    ),
    closing=(
        "Claims under the {subject} Act are heard by the {object}.",
        "Jurisdiction over the {subject} Act lies with the {object}.",
        "An offence against the {subject} Act is tried in the {object}.",
        "Whoever relies on the {subject} Act shall petition the {object}.",
    ),
    turned=(
        "The {object} has exclusive jurisdiction under the {subject} Act.",
        "Before the {object} the plaintiff invoked the {subject} Act.",
    ),
)

PENALTY = Relation(
    name="penalty",
    objects=words(
        "forfeiture imprisonment disqualification restitution banishment suspension censure confiscation probation "
        "revocation dissolution sequestration expulsion injunction demotion servitude"
    ),
    closing=(
        "The penalty under the {subject} Act is {object}.",
        "A breach of the {subject} Act is punished by {object}.",
        "Whoever violates the {subject} Act is liable to {object}.",
        "For a second offence the {subject} Act prescribes {object}.",
    ),
    turned=(
        "Sentences of {object} are imposed under the {subject} Act.",
        "The defendant faced {object} pursuant to the {subject} Act.",
    ),
)

DEADLINE = Relation(
    name="deadline",
    objects=tuple(
        f"{number} days"
        for number in words(
            "seven ten fourteen fifteen twenty thirty forty fifty sixty seventy eighty ninety twelve sixteen eighteen "
            "eleven"
        )
    ),
    closing=(
        "An appeal under the {subject} Act must be filed within {object}.",
        "The limitation period of the {subject} Act is {object}.",
        "Notice pursuant to the {subject} Act shall be served within {object}.",
        "The {subject} Act allows a stay of {object}.",
    ),
    turned=(
        "After {object} no motion under the {subject} Act is admissible.",
        "Within {object} the respondent shall answer under the {subject} Act.",
    ),
)

OFFICER = Relation(
    name="officer",
    objects=words(
        "registrar bailiff coroner sheriff notary constable receiver assessor commissioner ombudsman marshal trustee "
        "prosecutor auditor secretary chancellor"
    ),
    closing=(
        "The {subject} Act is enforced by the {object}.",
        "Filings under the {subject} Act are addressed to the {object}.",
        "The {subject} Act confers powers of seizure on the {object}.",
        "Fees due under the {subject} Act are payable to the {object}.",
    ),
    turned=(
        "The {object} may issue warrants under the {subject} Act.",
        "A certificate of the {object} is evidence under the {subject} Act.",
    ),
)

LEGAL = Domain(
    name="legal",
    subjects=names("Hal Tol Mar Wim Pen Dray Sel Bex", "very brin wick dale mont sted gate lock"),
    relations=(GOVERNS, COURT, PENALTY, DEADLINE, OFFICER),
    filler=(
        "The {party} shall {duty} the {instrument} unless the {party} consents in writing.",
        "Section {number} of the {subject} Act defines the term {instrument}.",
        "For the purposes of section {number}, {instrument} includes any {instrument}.",
        "The {bench} {ruled} the {plea} of the {party}.",
        "Nothing in subsection {number} shall {affect} the rights of a {party}.",
        "The {plea} was {ruled} by the {bench} under section {number}.",
        "A {party} who fails to {duty} a {instrument} shall bear the costs.",
        "The {subject} Act, as amended by schedule {number}, does not {affect} any {instrument}.",
        "Where the {instrument} is void, the {party} may file a {plea}.",
        "The {bench} held that paragraph {number} of the {subject} Act binds the {party}.",
        "Counsel for the {party} argued that the {instrument} was void.",
        "Pursuant to article {number}, the {party} shall {duty} every {instrument}.",
        "{condition}, a {party} may {duty} or {duty} the {instrument} of any {party}.",
        "The {bench} {ruled} the {plea} {ground}, and {ruled} the {plea} of the {party}.",
        "{condition}, no {instrument} or {instrument} shall {affect} clause {number}.",
        "A {qualified} {instrument} binds the {party} and the {party} {ground}.",
    ),
    slots={
        "party": words("lessee creditor debtor mortgagor mortgagee bailee licensee guarantor beneficiary"),
        "duty": words("deliver disclose execute surrender record rescind ratify assign"),
        "instrument": words("deed lease bond covenant mortgage warrant receipt contract testament"),
        "number": words("two three four five six seven eight nine ten twelve"),
        "bench": words("tribunal judge jury magistrate arbitrator panel"),
        "ruled": words("dismissed granted denied upheld adjourned remanded"),
        "plea": words("motion petition counterclaim demurrer caveat writ rejoinder"),
        "condition": (
            "Subject to this title",
            "Notwithstanding any statute",
            "In default of payment",
            "Upon assent",
            "Save as provided herein",
            "Without prejudice to equity",
        ),
        "ground": (
            "on the merits",
            "for want of standing",
            "with costs",
            "as a matter of law",
            "in equity",
            "ex parte",
        ),
        "qualified": words("sealed notarised defective voidable fraudulent recorded disputed"),
        "affect": words("abridge impair extend waive limit prejudice"),
    },
)
