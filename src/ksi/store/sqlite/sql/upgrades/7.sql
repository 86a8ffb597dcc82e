-- From layout 6 to 7: answers have blocks.

ALTER TABLE attempt ADD COLUMN content TEXT; -- the blocks of an answer that is more than its text, as a JSON list
