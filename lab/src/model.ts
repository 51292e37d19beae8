/** What the panel knows: the last status, or why there is none. */
import { ServerConnection } from '@jupyterlab/services';
import { VDomModel } from '@jupyterlab/ui-components';

import { fetchStatus, IStatus, NoProject } from './status';

export type State =
  | { kind: 'loading' }
  | { kind: 'ready'; status: IStatus }
  | { kind: 'empty'; message: string }
  | { kind: 'error'; message: string };

export class StatusModel extends VDomModel {
  constructor(private _settings: ServerConnection.ISettings) {
    super();
  }

  get state(): State {
    return this._state;
  }

  /** True while an answer is awaited; the last one stays on view until then. */
  get busy(): boolean {
    return this._busy;
  }

  /** The time of the last answer that was a status. */
  get updated(): Date | null {
    return this._updated;
  }

  /** The project's folder, relative to JupyterLab's root; '' is the root itself. */
  get folder(): string {
    return this._folder;
  }
  set folder(value: string) {
    if (value !== this._folder) {
      this._folder = value;
      this._state = { kind: 'loading' };
      void this.refresh();
    }
  }

  async refresh(): Promise<void> {
    const request = ++this._request;
    this._busy = true;
    this.stateChanged.emit();
    const state = await this._ask();
    if (request !== this._request || this.isDisposed) {
      return; // a newer question is under way
    }
    this._busy = false;
    this._state = state;
    if (state.kind === 'ready') {
      this._updated = new Date();
    }
    this.stateChanged.emit();
  }

  private async _ask(): Promise<State> {
    try {
      const status = await fetchStatus(this._settings, this._folder);
      return { kind: 'ready', status };
    } catch (error) {
      const kind = error instanceof NoProject ? 'empty' : 'error';
      return { kind, message: (error as Error).message };
    }
  }

  private _state: State = { kind: 'loading' };
  private _busy = false;
  private _updated: Date | null = null;
  private _folder = '';
  private _request = 0;
}
