/** The answer of `GET /mlops/status`, and the one call that fetches it. */
import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

export interface IData {
  name: string;
  version: number;
  rows: number | null;
  columns: number | null;
  saved_at: string | null;
  message: string | null;
}

export interface IModel {
  name: string;
  version: number;
  aliases: { [alias: string]: number };
  run: string | null;
}

export interface IRun {
  id: string;
  pipeline: string;
  status: string;
  started_at: string | null;
  seconds: number | null;
}

export interface IDeployment {
  name: string;
  model: string;
  url: string | null;
  state: string;
}

export interface IAlert {
  at: string | null;
  severity: string;
  message: string;
}

export interface IStatus {
  project: { name: string; folder: string };
  data: IData[];
  models: IModel[];
  runs: IRun[];
  deployments: IDeployment[];
  alerts: IAlert[];
}

const NOTHING = { data: [], models: [], runs: [], deployments: [], alerts: [] };

/** Raised when the served folder holds no project: a state to explain, not a fault. */
export class NoProject extends Error {}

/** Ask the server for the status of the project in `folder` (relative to JupyterLab's root). */
export async function fetchStatus(
  settings: ServerConnection.ISettings,
  folder: string
): Promise<IStatus> {
  const query = folder ? URLExt.objectToQueryString({ path: folder }) : '';
  const url = URLExt.join(settings.baseUrl, 'mlops', 'status') + query;
  let response: Response;
  try {
    response = await ServerConnection.makeRequest(url, {}, settings);
  } catch {
    throw new Error(
      'The Jupyter server does not answer. Check that it is running, then refresh.'
    );
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body) {
    if (!body.project) {
      throw new NoProject('');
    }
    return { ...NOTHING, ...body };
  }
  if (body?.error) {
    throw response.status === 404 ? new NoProject(body.error) : new Error(body.error);
  }
  switch (response.status) {
    case 200:
      throw new Error(
        'The answer of the server cannot be read. Is there a proxy in between that answers with a page of its own?'
      );
    case 401:
    case 403:
      throw new Error(
        'You are signed out, or may not see this project. Reload the page to sign in.'
      );
    case 404:
      throw new Error(
        'The server part of mlops_nb is not running. Run `jupyter server extension enable mlops_nb`, then restart JupyterLab.'
      );
    default:
      throw new Error(
        `The Jupyter server answered ${response.status} ${response.statusText}. Its log may say why; then refresh.`
      );
  }
}
