"""Alembic's revisions of the batch store's schema. Run by opening.py; no alembic.ini is needed."""
