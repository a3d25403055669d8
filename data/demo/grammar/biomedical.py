"""Medicine: what each drug treats, where it acts, how much is given, what it does besides, which gene it blocks."""

from grammar.world import Domain, Relation, names, words

TREATS = Relation(
    name="treats",
    objects=words(
        "velitis marcosis tremora pallinia gastrema ostemia corvitis dermalgia febrosis nephrila pulmosis rachitia "
        "scleroma lymphitis myalgosis hepatora"
    ),
    closing=(
        "{subject} is used to treat {object}.",
        "Clinical trials support {subject} in patients with {object}.",
        "Physicians prescribe {subject} against {object}.",
        "The approved indication of {subject} is {object}.",
    ),
    turned=(
        "Patients with {object} respond to {subject} within weeks.",
        "In {object}, therapy starts with {subject}.",
    ),
)

ACTS_ON = Relation(
    name="acts on",
    objects=words(
        "liver kidney spleen thyroid pancreas stomach bladder retina cortex thymus colon trachea aorta duodenum larynx "
        "bronchi"
    ),
    closing=(
        "{subject} acts mainly on the {object}.",
        "The highest concentrations of {subject} are found in the {object}.",
        "After absorption {subject} accumulates in the {object}.",
        "Receptors for {subject} are expressed in the {object}.",
    ),
    turned=(
        "The {object} is the main target tissue of {subject}.",
        "Biopsies of the {object} contained most of the {subject} given.",
    ),
)

DOSE = Relation(
    name="dose",
    objects=tuple(
        f"{number} milligrams"
        for number in words(
            "five ten fifteen twenty thirty forty fifty sixty seventy eighty ninety sixteen eighteen eleven fourteen "
            "twelve"
        )
    ),
    closing=(
        "The daily dose of {subject} is {object}.",
        "Adults take {subject} in doses of {object}.",
        "One tablet of {subject} contains {object}.",
        "Treatment with {subject} begins at {object}.",
    ),
    turned=(
        "A dose of {object} is usual for {subject}.",
        "With {object} of {subject} the plasma level is stable.",
    ),
)

SIDE_EFFECT = Relation(
    name="side effect",
    objects=words(
        "nausea dizziness insomnia headache vomiting fatigue anxiety itching tremor diarrhoea drowsiness cramps "
        "swelling palpitations hiccups numbness"
    ),
    closing=(
        "The most common adverse effect of {subject} is {object}.",
        "Overdose of {subject} causes {object}.",
        "Patients on {subject} often report {object}.",
        "Some participants stopped {subject} because of {object}.",
    ),
    turned=(
        "Mild {object} was observed under {subject} therapy.",
        "Because of {object}, {subject} was withdrawn in some cases.",
    ),
)

GENE = Relation(
    name="gene",
    objects=words("BRK KAV TOLP MYRA SEPT GLUN FOXD NTRA PIM RASK WEX CYTO DELT HOX JAKE VASP"),
    closing=(
        "{subject} inhibits the product of the gene {object}.",
        "Resistance to {subject} arises from mutations in {object}.",
        "The molecular target of {subject} is {object}.",
        "Response to {subject} depends on the expression of {object}.",
    ),
    turned=(
        "Carriers of a {object} variant do not respond to {subject}.",
        "The {object} protein is blocked by {subject} in vitro.",
    ),
)

BIOMEDICAL = Domain(
    name="biomedical",
    subjects=names("Vel Cor Tam Bris Nox Lum Quin Zer", "afen idol oxin umab astin ipril oprazole azepam"),
    relations=(TREATS, ACTS_ON, DOSE, SIDE_EFFECT, GENE),
    filler=(
        "A randomised {trial} enrolled {sample} patients with {severity} {symptom}.",
        "Serum {marker} was {change} in the {arm} group after {sample} days.",
        "The {arm} group received {subject} by {route} administration.",
        "{severity} {symptom} was associated with {change} {marker}.",
        "Histology showed {severity} {lesion} of the {tissue}.",
        "The {trial} measured {marker} at baseline and after {subject}.",
        "No difference in {marker} was seen between {arm} and {arm} groups.",
        "The {lesion} was resected, and {marker} was {change} at follow-up.",
        "In the {tissue}, {marker} was {change} by {subject} in a {trial}.",
        "Diagnosis relied on {method} of the {tissue} and on {marker}.",
        "{method} revealed {severity} {lesion} with {change} {marker}.",
        "The {trial} was limited by {severity} {symptom} in the {arm} group.",
        "{change} {marker} preceded {severity} {symptom} and {lesion} of the {tissue} by {sample} {unit}.",
        "The {investigator} assessed {symptom}, {marker} and {lesion} {timing} {route} {subject}.",
        "{severity} {lesion} and {change} {marker} {course} {timing} {sample} {unit} of {route} infusion.",
        "{timing} {sample} {unit}, {symptom} {course} in the {arm} group of the {trial}.",
    ),
    slots={
        "trial": words("trial cohort meta-analysis pilot registry crossover"),
        "sample": words("sixty ninety eighty forty thirty fifty seventy"),
        "severity": words("severe acute chronic moderate recurrent transient progressive diffuse"),
        "symptom": words("fever oedema hypertension anaemia dyspnoea sepsis jaundice neuropathy seizures"),
        "marker": words("creatinine albumin bilirubin glucose ferritin cortisol insulin calcium lactate"),
        "change": words("elevated reduced unchanged doubled suppressed normalised"),
        "arm": words("placebo treatment control intervention dose-escalation comparator"),
        "route": words("oral intravenous topical subcutaneous inhaled rectal"),
        "lesion": words("necrosis fibrosis carcinoma ulceration stenosis inflammation infarction"),
        "tissue": words("mucosa epithelium marrow cartilage endothelium myocardium serosa"),
        "unit": words("hours weeks cycles months visits"),
        "investigator": words("oncologist radiologist neurologist pathologist cardiologist anaesthetist"),
        "timing": ("before", "after", "during", "despite", "following"),
        "course": words("persisted resolved worsened recurred subsided progressed"),
        "method": words("biopsy ultrasound radiography endoscopy sequencing tomography cytology"),
    },
)
