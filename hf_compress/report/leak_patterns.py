"""What tokens of access, folders of a machine and private addresses look like.

Every repetition that something follows is bounded, so that no text, however it is made, takes long to look through.
"""

import re

NAME = r"[^\s\\/\"'`<>|:;,*?()\[\]{}]{1,255}"  # a part of a path
PREFIXES = (  # of tokens: then `-`, `_` or `.`, then chance, digits among it
    r"api|api_org|hf_jwt|gh[pousr]|github_pat|gl(?:pat|dt|cbt|ptt|rt|soat|ft|imt|agent|oas)|npm|pypi|rubygems|[spr]k|SK"
    r"|sess|xox[abceprs]|xapp|do[opr]_v1|shp(?:at|ss|ca|pa)|ya29|GOCSPX|SG|r8|nvapi|gsk|tvly|lsv2|pcsk|figd|sntry[su]"
    r"|dckr_[op]at|oauth|whsec|AC|key|secret|ntn|lin_(?:api|oauth)|pul|pulumi|gls?[ac]|pplx|xai|fw|jina|ph[cx]|rnd"
    r"|NRAK|NRJS|NRII|HRKU|hv[bsr]|dp\.(?:pt|st|ct|sa|scim|audit)|sq0(?:atp|csp|idp)|tskey|v1\.0|sl|cfut|ctx7sk"
)
TOKEN = re.compile(
    rf"\b(?:{PREFIXES})[-_.](?=[A-Za-z_.-]{{0,60}}\d)[\w.-]{{16,}}|\bhf_[A-Za-z0-9]{{16,}}"
    r"|\bA(?:KIA|SIA|IDA|ROA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bATATT3[\w=-]{20,}|\bATBB\w{20,}|\bEAA[A-Za-z0-9]{30,}"
    r"|\b(?:SK|AC|dapi|dkea)[0-9a-f]{32}\b|\b[0-9a-f]{32}-us\d{1,2}\b|\b\d{8,10}:[\w-]{35}\b|\b1//0[\w-]{20,}"
    r"|\beyJ[\w-]{8,400}\.eyJ[\w-]{8,2000}\.[\w-]+|\bssh-(?:rsa|dss|ed25519) {1,4}AAAA[\w+/=]+"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"|\b[Bb]earer {1,4}[\w.~+/-]{8,}|\b[Aa]uthorization[\"']?\s{0,4}[:=]\s{0,4}[\"']?\w{1,20}\s{1,4}\S{8,}"
    r"|\b[Cc]ookie: \S+|\bpat\w{14}\.[0-9a-f]{64}\b"
    r"|://[^\s/:@\"']{0,200}:[^\s/@\"']{1,200}@|://[A-Za-z0-9_-]{16,200}@"
    r"|\bhooks\.slack\.com/services/\S+|\bdiscord(?:app)?\.com/api/webhooks/\S+|\bwebhook\.office\.com/\S+"
    r"|(?<![\w+/=.-])(?=[a-z0-9+/]{0,39}[A-Z])(?=[A-Z0-9+/]{0,39}[a-z])(?=[A-Za-z+/]{0,39}\d)[A-Za-z0-9+/]{40}(?![\w+/=.-])"
)
# an option or key that says of itself what it holds; `pad_token` and the like are none
SECRET_NAME = (
    r"(?:--?[\w-]{0,40}token|(?:--?|\b)(?:[\w-]{0,40}[_-])?(?:pass(?:word|wd|wort|phrase)?|pwd|secret|api[_-]?key|"
    r"access[_-]?key|private[_-]?key(?!_id)|credentials?|(?:hf|hub|auth|access|api|bearer|refresh|session)[_-]?token)"
    r"|\b(?:api|shared|shared_?access|account|access|auth)_?key)"
)
SECRET = re.compile(  # `name: value`, `--name value`, `password value1`
    rf"(?i)(?:{SECRET_NAME}[\"']?\s{{0,8}}[=:]\s{{0,8}}|(?=--){SECRET_NAME}\s{{1,8}}(?!-)|\bpassword\s{{1,8}}(?=\S{{0,40}}\d))"
    r"(?P<value>\"[^\"]{1,400}\"|'[^']{1,400}'|[^\s,;\"'}]{6,})"
)
# names that hold many things, and a value that only a secret has; variables of an environment
VALUE = re.compile(
    r"(?:(?i:(?<![\w-])(?:token|auth|key|sig|signature|x-amz-signature))[\"']?\s{0,8}[=:]\s{0,8}[\"']?"
    r"(?P<token>[\w.~+/%-]{12,}=*))|\b[A-Z][A-Z0-9_]{0,40}_(?:KEY|TOKEN|SECRET|PASS|PWD)\s{0,8}[=:]\s{0,8}[\"']?"
    r"(?P<value>[^\s,;\"'}]{6,})"
)
LONG = re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9]{20,}(?![A-Za-z0-9])")  # of which `is_random` says more
PICTURE = re.compile(r"base64,[A-Za-z0-9+/=]+")
MAIL = re.compile(r"(?:(?<![\w.@/:+-])|(?<=mailto:))[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
HOME = re.compile(
    r"(?i)(?<![\w.-])(?:file:/{1,4})?(?:/(?:mnt/|cygdrive/)?[a-z](?=/))?(?:[a-z][:|])?[\\/]{1,4}"
    rf"(?:home|users|documents and settings)[\\/]{{1,4}}{NAME}[^\s\"'<>]*"
    rf"|(?<![\w.])/root/{NAME}|(?<![\w./~])~[\w.-]{{0,64}}[\\/]{{1,4}}{NAME}"
)
FOLDER = re.compile(
    rf"(?<![\w.:/<~\\-])(?:file:/{{1,4}})?/{{1,4}}{NAME}(?:/{{1,4}}{NAME})+/?"
    rf"|(?<!\w)[A-Za-z]:[\\/]{{1,4}}(?!/){NAME}[^\s\"'<>]*|(?<![\w\\])\\\\[\w.$-]{{2,64}}\\[\w$.-]+[^\s\"'<>]*"
)
PRIVATE = re.compile(
    r"(?i)(?<![\w.-])(?:localhost|127(?:\.\d{1,3}){3}|10(?:\.\d{1,3}){3}|192\.168(?:\.\d{1,3}){2}|169\.254(?:\.\d{1,3}){2}"
    r"|172\.(?:1[6-9]|2\d|3[01])(?:\.\d{1,3}){2}|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7])(?:\.\d{1,3}){2})(?![\w.])(?::\d{1,5})?"
    r"|(?<![\w:])(?:fe80|f[cd][0-9a-f]{2}):[0-9a-f:]{2,}|\bhttps?://[\w-]{1,200}(?=[:/\s\"'<]|$)[^\s\"'<]*"
    r"|\b(?:https?://)?(?:[\w-]{1,63}\.){1,8}(?:local|internal|intranet|corp|lan|localdomain|home\.arpa)\b(?!\()[^\s\"'<]*"
    r"|\b(?:s3a?|gs|gcs|abfss?|wasbs?|hdfs|dbfs|smb|nfs|ssh|sftp|ftp|oss|r2|vscode-remote)://[^\s\"'<]+"
    rf"|(?<![\w./-])(?:[\w.-]{{1,64}}@)?[a-z][\w.-]{{1,64}}:/(?!/){NAME}/[^\s\"'<]*"
)


def is_random(word: str) -> bool:
    """Letters of both cases and digits in no order that a name has, as in tokens of any make; digests have one case."""
    if sum(map(str.isdigit, word)) < 3:
        return False
    is_mixed = word != word.lower() and word != word.upper()
    return is_mixed or (len(word) >= 32 and not re.fullmatch("[0-9a-fA-F]+", word) and not word.isdigit())


def holds_secret(value: str) -> bool:
    """Whether what follows `key:` and the like is a secret: letters and digits, and no name with a blank or a path."""
    word = value.rstrip("=")
    return any(c.isdigit() for c in word) and any(c.isalpha() for c in word) and (
        is_random(word) or len(word) >= 16 or bool(re.fullmatch("[0-9a-z]{12,}", word)))  # fmt: skip
