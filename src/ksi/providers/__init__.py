"""Who answers: one protocol (`base`), one small file per provider."""
