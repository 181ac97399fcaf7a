"""The one exception that a user sees as a sentence."""


class UserError(Exception):
    """Bad input or an environment that cannot work: the message names the value, the rule and the remedy."""
